"""
Draws the pictures of docs/results from the records of docs/notebook/records (`make figures`).

One colour per algorithm, the same in all pictures. Only runs with today's defaults are drawn: options that change speed
alone are allowed, any other option is an experiment and belongs to the notebook.
"""

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

DOCS = Path(__file__).parent
RECORDS, RESULTS = DOCS / "notebook" / "records", DOCS / "results"
#: Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = {
    "CPQL": "#d55e00",
    "ConsistencyAC": "#0072b2",
    "DiffusionQL": "#009e73",
    "ConsistencyBC": "#56b4e9",
    "DiffusionBC": "#999999",
    "RACTD": "#cc79a7",
    "SAC": "#000000",
    "TD3": "#666666",
}
SPEED_OPTIONS = {"compile", "precision"}


def records(name: str) -> list[dict[str, Any]]:
    """
    :param name: a file of records, one JSON object per line
    :return: them
    """
    return [json.loads(line) for line in (RECORDS / name).read_text().splitlines()]


def by_default(run: dict[str, Any]) -> bool:
    """
    :param run: record of a run
    :return: whether it had the default options
    """
    return set(ast.literal_eval(run["options"] or "{}")) <= SPEED_OPTIONS


def tidy(axis: plt.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)


def dots(axis: plt.Axes, rows: list[str], groups: dict[str, dict[str, list[float]]]) -> None:
    """One row per task, one dot per algorithm at the mean of the seeds, a line from the lowest seed to the highest."""
    for i, (name, values) in enumerate(groups.items()):
        height = (i - (len(groups) - 1) / 2) * -0.22
        for row, label in enumerate(rows):
            seeds = values.get(label)
            if seeds:
                y = len(rows) - 1 - row + height
                colour = COLOURS.get(name.split(",")[0].split(" ")[0], "0.5")
                axis.plot([min(seeds), max(seeds)], [y, y], color=colour, linewidth=2)
                axis.plot(np.mean(seeds), y, "o", color=colour, markersize=6, label=name if row == 0 else None)
    axis.set_yticks(range(len(rows)), rows[::-1])
    axis.tick_params(left=False)
    tidy(axis)


def offline(steps: int = 50_000) -> None:
    """Scores of the actor-critics on six datasets."""
    runs = [run for run in records("offline/runs.jsonl") if run["offline_steps"] == steps and by_default(run)]
    names = [name for name in COLOURS if any(run["algo"] == name for run in runs)]
    data = [f"zoo/{robot}/{level}-v0" for robot in ("hopper", "halfcheetah") for level in ("mixed", "medium", "expert")]
    labels = [" ".join(name.removesuffix("-v0").split("/")[1:]) for name in data]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharex=True, sharey=True, layout="constrained")
    for axis, key, title in zip(
        axes,
        ("deterministic_score", "sampled_score"),
        ("deterministic actions", "sampled actions, chosen by value"),
        strict=True,
    ):
        groups: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        for run in runs:
            # float32 and bfloat16 of one seed are one run: the records hold a few of both
            if "bf16" in run["options"]:
                groups[run["algo"]].setdefault(labels[data.index(run["data"])], []).append(run[key])
        dots(axis, labels, groups)
        for row, name in enumerate(data):
            behaviour = next(run["behaviour_score"] for run in runs if run["data"] == name)
            y = len(data) - 1 - row
            axis.plot([behaviour, behaviour], [y - 0.38, y + 0.38], color="0.6", linewidth=2, zorder=0)
        axis.plot([], [], color="0.6", label="the data")
        axis.set(xlabel="normalized score", title=title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, "offline")


def online() -> None:
    """Learning curves from scratch."""
    tasks = [("Pendulum-v1", 8_000), ("Hopper-v5", 30_000), ("HalfCheetah-v5", 30_000)]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (env, steps) in zip(axes, tasks, strict=True):
        curves: dict[str, list[list[float]]] = {}
        for run in records("online/runs.jsonl"):
            if run["data"] == env and run["online_steps"] == steps and by_default(run):
                curves.setdefault(run["algo"], []).append([point["return"] for point in run["curve"]])
                x = [point["step"] for point in run["curve"]]
        for name, values in curves.items():
            lines = np.array(values)
            axis.plot(x, lines.mean(axis=0), color=COLOURS[name], linewidth=2)
            axis.fill_between(x, lines.min(axis=0), lines.max(axis=0), color=COLOURS[name], alpha=0.2, linewidth=0)
            seeds = f"{len(lines)} seed{'s' * (len(lines) > 1)}"
            axis.plot([], [], color=COLOURS[name], linewidth=2, label=f"{name} ({seeds})")
        axis.legend(frameon=False, loc="best")
        axis.set(title=env, xlabel="steps in the environment")
        tidy(axis)
    axes[0].set_ylabel("mean return of 10 episodes")
    save(figure, "online")


def speed() -> None:
    """Microseconds per action, and per gradient step, of the newest run with one thread."""
    rows = [row for row in records("speed/speed.jsonl") if row["threads"] == 1]
    newest = max(row["run"] for row in rows if row["what"] == "exported")
    batches = {"gradient step": 256, "predict": 1, "exported": 1}
    times = {
        (row["system"], row["what"]): row["median_us"]
        for row in rows
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
                axis.barh(row, value / 1000, color=COLOURS[system.split(" ")[0]], height=0.6)
                axis.annotate(f" {value / 1000:.3g}", (value / 1000, row), va="center", annotation_clip=False)
        axis.set_yticks(range(len(systems)), systems[::-1])
        axis.set(title=title)
        axis.margins(x=0.15)
        axis.tick_params(left=False)
        tidy(axis)
    save(figure, "speed")


def planner() -> None:
    """RACTD: its teacher, its student without rewards, and its student with them, each on three datasets."""
    data = ["zoo/hopper/mixed-v0", "zoo/hopper/medium-v0", "zoo/halfcheetah/medium-v0"]
    labels = [" ".join(name.removesuffix("-v0").split("/")[1:]) for name in data]
    names = {
        "": ("teacher, 158 passes", 158, "0.4"),
        "{'reward_weight': 0.0}": ("student without rewards, 1 pass", 1, "#e69f00"),
        "{'reward_weight': 0.3}": ("student with rewards, 1 pass", 1, COLOURS["RACTD"]),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, sharey=True, layout="constrained")
    runs = {(run["data"], run["student"]): run for run in records("planner/runs.jsonl") if run["scored"]}
    for axis, key in zip(axes, ("deterministic", "sampled"), strict=True):
        for i, (student, (name, passes, colour)) in enumerate(names.items()):
            for row, dataset in enumerate(data):
                found = next((p for p in runs[dataset, student]["planners"] if p["passes"] == passes), None)
                if found:
                    y = len(data) - 1 - row + (1 - i) * 0.22
                    axis.plot(found[key], y, "o", color=colour, label=name if row == 0 else None)
        for row, dataset in enumerate(data):
            y = len(data) - 1 - row
            axis.plot(2 * [runs[dataset, ""]["behaviour"]], [y - 0.38, y + 0.38], color="0.7", linewidth=2, zorder=0)
        axis.plot([], [], color="0.7", linewidth=2, label="the data")
        axis.set_yticks(range(len(data)), labels[::-1])
        axis.set(xlabel="normalized score", title=f"{key} plans")
        tidy(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, "planner")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    for draw in (offline, online, speed, planner):
        draw()
