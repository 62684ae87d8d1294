"""
Draws the pictures of docs/results from the records of docs/notebook/records, and prints their numbers (`make figures`).

Only runs with today's default options are drawn: options that change speed alone are allowed, any other is an experiment and
belongs to the notebook.
"""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from sb3_consistency.benchmark.drawing import name_lines, thousands, with_interval
from sb3_consistency.benchmark.intervals import LAST, estimate
from sb3_consistency.benchmark.online_report import online_sections
from sb3_consistency.registry import colour_of

DOCS = Path(__file__).parent
RECORDS, RESULTS = DOCS / "notebook" / "records", DOCS / "results"
SPEED_OPTIONS = {"compile", "precision"}
#: (suite, algorithm) -> a day, and what runs before it had to be told to have today's defaults (None: they can't have them);
#: other runs are the notebook's.
TOLD_BEFORE: dict[tuple[str, str], tuple[str, dict[str, Any] | None]] = {
    ("online", "CPQL"): ("2026-12-03", {"policy_delay": 2, "deterministic_policy": "ema"}),
    ("offline-to-online", "CPQL"): ("2026-12-01", None),
}
DATA = "0.6"
#: "sampled" is chosen by value among several
WAYS_TO_ACT = {"deterministic": ("full", 0.17), "sampled": ("none", -0.17)}
MUJOCO = ("Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5")
BOX2D = ("LunarLanderContinuous-v3", "BipedalWalker-v3")


def records(suite: str, name: str = "runs.jsonl") -> list[dict[str, Any]]:
    """
    :param suite: folder of records
    :param name: a file of records in it, one JSON object per line
    :return: them
    """
    return [json.loads(line) for line in (RECORDS / suite / name).read_text().splitlines()]


def by_default(run: dict[str, Any]) -> bool:
    """
    :param run: record of a run
    :return: whether it had the default options of today
    """
    options = ast.literal_eval(run["options"] or "{}")
    day, told = TOLD_BEFORE.get((run["suite"], run["algo"]), ("", None))
    needed = told if run["date"] < day else {}
    return {name: value for name, value in options.items() if name not in SPEED_OPTIONS} == needed


def short(dataset: str) -> str:
    """
    :param dataset: id, like zoo/hopper/mixed-v0
    :return: its robot and level
    """
    return " ".join(dataset.removesuffix("-v0").split("/")[1:])


def tidy(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)


def seeds(axis: plt.Axes, row: float, values: list[float], colour: str, fill: str = "full") -> None:
    """
    :param axis: to draw on
    :param row: height
    :param values: one per seed, dots; of several a bar at their mean
    :param colour: of both
    :param fill: of the dots, "none" for rings
    """
    axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.5, markersize=5, fillstyle=fill)
    if len(values) > 1:
        axis.plot(np.mean(values), row, "|", color=colour, markersize=10, markeredgewidth=2.5)


def curve(axis: plt.Axes, x: list[float], lines: np.ndarray, colour: str, style: str = "-") -> None:
    """
    :param axis: to draw on
    :param x: steps
    :param lines: one per seed, thin; a thick one at their mean
    :param colour: of all
    :param style: of all
    """
    axis.plot(x, lines.T, style, color=colour, linewidth=0.8, alpha=0.5)
    axis.plot(x, lines.mean(axis=0), style, color=colour, linewidth=2.5)


def by_dataset(
    names: dict[str, str], data: dict[str, float], scores: Callable[[str, str, str], list[float]], height: float
) -> plt.Figure:
    """
    One panel per dataset, the names on the axis in their colours.

    :param names: name -> colour
    :param data: dataset -> score of the data itself, a grey line
    :param scores: those of a dataset, a name and a way to act
    :param height: in inches
    :return: the figure
    """
    n_rows = -(-len(data) // 3)
    figure, axes = plt.subplots(n_rows, 3, figsize=(11, height), sharex=True, sharey=True, layout="constrained", squeeze=False)
    for axis, (dataset, behaviour) in zip(axes.flat, data.items(), strict=True):
        axis.axvline(behaviour, color=DATA, linewidth=2, zorder=0)
        for row, (name, colour) in enumerate(names.items()):
            for acting, (fill, above) in WAYS_TO_ACT.items():
                seeds(axis, above - row, scores(dataset, name, acting), colour, fill)
        axis.set_title(short(dataset), loc="left", fontsize="medium", pad=16)
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "color": "0.4", "fontsize": "small"}
        axis.annotate("the data", (behaviour, 1.02), **place)
        axis.tick_params(left=False)
        tidy(axis)
    for axis in axes[:, 0]:
        name_rows(axis, names)
    for axis in axes[-1]:
        axis.set_xlabel("normalized score")
    return figure


def name_rows(axis: plt.Axes, names: dict[str, str]) -> None:
    """
    :param axis: of which rows 0, -1, ... get names
    :param names: name -> colour
    """
    axis.set_yticks(-np.arange(len(names)), list(names))
    for text, colour in zip(axis.get_yticklabels(), names.values(), strict=True):
        text.set_color(colour)
    axis.set_ylim(0.5 - len(names), 0.5)


def offline(steps: int = 50_000) -> None:
    """Scores of the actor-critics on six datasets, and their interquartile means."""
    # float32 and bfloat16 of one seed are one run: the records hold a few of both
    runs = [
        run for run in records("offline") if run["offline_steps"] == steps and by_default(run) and "bf16" in run["options"]
    ]
    names = {name: colour_of(name) for name in ("CPQL", "ConsistencyAC", "DiffusionQL")}
    sets = [f"zoo/{robot}/{level}-v0" for robot in ("hopper", "halfcheetah") for level in ("mixed", "medium", "expert")]
    data = {name: next(run["behaviour_score"] for run in runs if run["data"] == name) for name in sets}

    def scores(dataset: str, name: str, acting: str) -> list[float]:
        return [run[f"{acting}_score"] for run in runs if (run["data"], run["algo"]) == (dataset, name)]

    save(by_dataset(names, data, scores, height=4.6), "offline")
    figure, axis = plt.subplots(figsize=(6.5, 0.8 + 0.5 * len(names)), layout="constrained")
    for row, (name, colour) in enumerate(names.items()):
        for acting, (fill, above) in WAYS_TO_ACT.items():
            groups = [np.array(scores(dataset, name, acting)) for dataset in sets]
            mean, *interval = iqm = estimate(groups)
            axis.plot(interval, 2 * [above - row], color=colour, linewidth=2)
            face = colour if fill == "full" else "white"
            axis.plot(mean, above - row, "o", color=colour, markerfacecolor=face, markersize=7)
            sizes = sorted({len(group) for group in groups})
            print(f"offline, {acting}, {name}: IQM {with_interval(iqm, 0)}, seeds per set {sizes}")
    axis.set_xlabel("interquartile mean of the normalized score, 95 % interval")
    axis.tick_params(left=False)
    tidy(axis)
    name_rows(axis, names)
    save(figure, "offline_iqm")


def from_scratch(env: str, steps: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """
    Print the means of the last points, too.

    :param env: id of the environment
    :param steps: of the runs
    :return: steps of the evaluations; algorithm -> returns, (seeds, evaluations)
    """
    curves: dict[str, list[list[float]]] = {}
    for run in records("online"):
        if run["data"] == env and run["online_steps"] == steps and by_default(run):
            curves.setdefault(run["algo"], []).append([point["return"] for point in run["curve"]])
            x = [point["step"] for point in run["curve"]]
    lines = {name: np.array(values) for name, values in curves.items()}
    for name, values in lines.items():
        finals = values[:, -LAST:].mean(axis=1)
        print(f"online, {env}, {steps:,} steps, {name}: {finals.mean():.0f}, by seed {finals.round().astype(int).tolist()}")
    return x, lines


def online() -> None:
    """Learning curves from scratch, and the mean of their last three points."""
    tasks = [("Pendulum-v1", 8_000), *((env, 100_000) for env in (*MUJOCO, *BOX2D))]
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.4), layout="constrained")
    axes.flat[-1].set_visible(False)
    for axis, (env, steps) in zip(axes.flat, tasks, strict=False):
        x, curves = from_scratch(env, steps)
        ends = []
        for name, lines in curves.items():
            curve(axis, x, lines, colour_of(name))
            ends.append((float(lines.mean(axis=0)[-1]), name, colour_of(name)))
        axis.set(title=env, xlabel="steps in the environment")
        thousands(axis)
        tidy(axis)
        name_lines(axis, ends)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean return of 10 episodes")
    save(figure, "online")


def relative_to_sac(steps: int = 100_000) -> None:
    """What the report of ``benchmark online`` says of MuJoCo's environments: means, and their intervals."""
    runs = [run for run in records("online") if run["online_steps"] == steps and by_default(run) and run["data"] in MUJOCO]
    # of today's default, however it was told then
    runs = [{**run, "options": "{}"} for run in runs if run["algo"] in ("SAC", "CPQL")]
    with TemporaryDirectory() as folder:
        print("online", *online_sections(runs, Path(folder), "online"), sep="\n")


def speed() -> None:
    """Microseconds per action, and per gradient step, of the newest run with one thread."""
    measured = [row for row in records("speed", "speed.jsonl") if row["threads"] == 1]
    newest = max(row["run"] for row in measured if row["what"] == "exported")
    batches = {"gradient step": 256, "predict": 1, "exported": 1}
    times = {
        (row["system"], row["what"]): row["median_us"]
        for row in measured
        if row["run"] == newest and row["batch"] == batches.get(row["what"]) and row.get("candidates") in (None, 1)
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, layout="constrained")
    systems = ["SAC", "TD3", "CPQL", "ConsistencyAC", "DiffusionQL (T = 5)"]
    panels = {
        "gradient step": "gradient step, ms (batch 256)",
        "predict": "predict, ms (batch 1)",
        "exported": "exported to ONNX, ms (batch 1)",
    }
    for axis, (what, title) in zip(axes, panels.items(), strict=True):
        for row, system in enumerate(systems[::-1]):
            value = times.get((system, what))
            if value is not None:
                axis.barh(row, value / 1000, color=colour_of(system), height=0.6)
                axis.annotate(f" {value / 1000:#.3g}", (value / 1000, row), va="center", annotation_clip=False)
        axis.set_yticks(range(len(systems)), systems[::-1])
        axis.set(title=title)
        axis.margins(x=0.15)
        axis.tick_params(left=False)
        tidy(axis)
    save(figure, "speed")


def planner() -> None:
    """RACTD: its teacher, its student without rewards, and its student with them, each on three datasets."""
    sets = ["zoo/hopper/mixed-v0", "zoo/hopper/medium-v0", "zoo/halfcheetah/medium-v0"]
    kinds = {
        "teacher, 158 passes": ("", 158, "0.3"),
        "student without rewards": ("{'reward_weight': 0.0}", 1, "#9970ab"),
        "student with rewards": ("{'reward_weight': 0.3}", 1, colour_of("RACTD")),
    }
    runs = {(run["data"], run["student"]): run for run in records("planner") if run["scored"]}

    def scores(dataset: str, name: str, acting: str) -> list[float]:
        student, passes, _ = kinds[name]
        return [planner[acting] for planner in runs[dataset, student]["planners"] if planner["passes"] == passes]

    data = {name: runs[name, ""]["behaviour"] for name in sets}
    save(by_dataset({name: colour for name, (_, _, colour) in kinds.items()}, data, scores, height=2.6), "planner")


def chunks() -> None:
    """Successes of clones that choose chunks of actions, on 31 demonstrations of OGBench's cube."""
    runs = [run for run in records("offline") if run["data"] == "cube/task2-few-v0"]
    labels = {
        "{}": "one action at a time",
        "{'horizon': 8}": "8 at once",
        "{'horizon': 16, 'executed_steps': 8}": "16, of which 8 are executed",
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.9), sharex=True, sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("deterministic", "sampled"), strict=True):
        for i, (options, label) in enumerate(labels.items()):
            values = [100 * run[f"{kind}_success"] for run in runs if run["options"] == options]
            seeds(axis, -i, values, colour_of("ConsistencyBC"))
            print(f"chunks, {kind}, {label}: {np.mean(values):.0f} %, by seed {[round(value) for value in values]}")
        axis.set(title=f"{kind} actions", xlabel="% of 50 episodes that reach the goal", xlim=(-3, 103), ylim=(-2.6, 0.6))
        tidy(axis)
    axes[0].set_yticks(-np.arange(len(labels)), labels.values())
    save(figure, "chunks")


def q_chunking() -> None:
    """Successes of CPQL with chunks and without, by gradient steps, on OGBench's cube."""
    teacher = {"distill_teacher": "consistency"}
    common = {"alpha": 6.0, "compile": True, "bc_loss": "distill", **teacher, "policy_kwargs": {"net_arch": [128, 128]}}

    def told(run: dict[str, Any]) -> dict[str, Any]:
        """Its options; before there was another, the teacher went without saying."""
        return {**(teacher if run["date"] < "2026-12-01" else {}), **ast.literal_eval(run["options"])}

    runs = [run for run in records("offline") if run["data"] == "ogbench:cube-single-play-v0.npz?task=2"]
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    ends = []
    for horizon, label, style in ((5, "horizon=5", "-"), (1, "one action at a time", "--")):
        mine = [run for run in runs if told(run) == {"horizon": horizon, **common}]
        lines = 100 * np.array([[point["success"] for point in run["curve"]] for run in mine])
        curve(axis, [point["step"] for point in mine[0]["curve"]], lines, colour_of("CPQL"), style)
        ends.append((float(lines.mean(axis=0)[-1]), label, colour_of("CPQL")))
        for kind in ("deterministic", "sampled"):
            values = [round(100 * run[f"{kind}_success"]) for run in mine]
            print(f"cube, {label}, {kind}: {np.mean(values):.0f} %, by seed {values}")
    axis.set(xlabel="gradient steps", ylabel="goal reached, % of 20 episodes", xlim=(0, 50_500), ylim=(-3, 103))
    thousands(axis)
    tidy(axis)
    name_lines(axis, ends)
    save(figure, "q_chunking")


def going_online() -> None:
    """Returns of CPQL before and after it goes online, and the share that is kept."""
    runs = [run for run in records("offline-to-online") if by_default(run)]
    sets = list(dict.fromkeys(run["data"] for run in runs))
    figure, axes = plt.subplots(1, len(sets), figsize=(11, 3.2), layout="constrained")
    for axis, data in zip(axes, sets, strict=True):
        mine = [run for run in runs if run["data"] == data]
        means = {}
        for phase, start, first in (("offline", -mine[0]["offline_steps"], -LAST), ("online", 0, 0)):
            x = [start + point["step"] for point in mine[0]["curve"] if point["phase"] == phase]
            lines = np.array([[point["return"] for point in run["curve"] if point["phase"] == phase] for run in mine])
            curve(axis, x, lines, colour_of("CPQL"))
            means[phase] = lines[:, first:].mean(axis=1)
            print(f"going online, {data}, {phase}: {means[phase].mean():.0f}, by seed {means[phase].round().astype(int)}")
        print(f"going online, {data}, kept by seed: {(means['online'] / means['offline']).round(3)}")
        axis.axvline(0, color=DATA, linewidth=1)
        axis.axhline(mine[0]["behaviour_return"], color=DATA, linewidth=2, zorder=0)
        axis.set(title=short(data), xlabel="steps before and after the switch")
        axis.set_ylim(bottom=0)
        thousands(axis)
        tidy(axis)
        name_lines(axis, [(mine[0]["behaviour_return"], "the data", "0.4")])
    axes[0].set_ylabel("mean return of 20 episodes")
    save(figure, "offline_to_online")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    for draw in (offline, online, relative_to_sac, going_online, chunks, q_chunking, speed, planner):
        draw()
