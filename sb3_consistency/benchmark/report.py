"""Tables and plots from the records of a benchmark run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_consistency.benchmark.drawing import format_number, markdown, new_figure, save, spread
from sb3_consistency.benchmark.planner import planner_section
from sb3_consistency.benchmark.published import published_score
from sb3_consistency.benchmark.records import PACKAGES, Records
from sb3_consistency.benchmark.speed_report import scaling_sections, speed_sections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUITE_TITLES = {
    "offline": "Offline",
    "online": "Online from scratch",
    "offline-to-online": "Offline, then online",
    "denoising": "Number of denoising steps",
}


def write_report(folder: Path) -> Path:
    """
    Write ``README.md`` with all tables, ``runs.csv``, ``speed.csv``, and the plots, from the folder's records.

    :param folder: folder of the benchmark run
    :return: path of the report
    :raises ValueError: if the folder holds no records
    """
    import pandas as pd

    runs, speed, scaling = (Records(folder, kind).read() for kind in ("runs", "speed", "scaling"))
    if not runs and not speed and not scaling:
        raise ValueError(
            f"folder: there are no benchmark records (runs.jsonl, speed.jsonl, scaling.jsonl) in {folder.resolve()}."
        )
    parts = ["# Benchmark", provenance_lines([*runs, *speed, *scaling])]
    if speed:
        frame = pd.DataFrame(speed)
        frame.to_csv(folder / "speed.csv", index=False)
        parts += speed_sections(frame, folder)
    if scaling:
        parts += scaling_sections(scaling, folder)
    planners = [run for run in runs if run["suite"] == "planner"]
    if planners:
        parts += ["## Planners", planner_section(planners)]
    if runs:
        flat = pd.DataFrame([{k: v for k, v in run.items() if k not in ("curve", "planners")} for run in runs])
        flat.to_csv(folder / "runs.csv", index=False)
        for suite, title in SUITE_TITLES.items():
            for budget in dict.fromkeys(budget_of(run) for run in runs if run["suite"] == suite):
                chosen = [run for run in runs if run["suite"] == suite and budget_of(run) == budget]
                parts += [f"## {title}, {budget}", *score_sections(suite, chosen, folder)]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def provenance_lines(records: Sequence[dict[str, Any]]) -> str:
    """
    :param records: records of any kind
    :return: every combination of versions, commit and processor among them, as a list
    """
    names = [name for name in PACKAGES if any(record.get(name) for record in records)]
    lines = {
        ", ".join(f"{name} {record[name]}" for name in names if record.get(name))
        + f"; commit {record['commit'] or 'unknown'}; {record['processor']}": None
        for record in records
    }
    return "Measured with\n" + "\n".join(f"- {line}" for line in lines)


def label(run: dict[str, Any]) -> str:
    """
    :param run: record of a run
    :return: its algorithm and options, as the tables name them
    """
    return str(run["algo"]) + ("" if run["options"] == "{}" else f" `{run['options'][1:-1]}`")


def budget_of(run: dict[str, Any]) -> str:
    """
    :param run: record of a run
    :return: how long it trained and how it was evaluated: runs that differ in it are not seeds of each other
    """
    phases = {"offline": run["offline_steps"], "online": run["online_steps"]}
    steps = " + ".join(f"{n} {phase} steps" for phase, n in phases.items() if n)
    return f"{steps}, {run['episodes']} episodes, {run['evaluations']} evaluations"


def score_of(run: dict[str, Any]) -> float:
    """
    :param run: record of a run
    :return: its normalized score; its return where the data has no reference returns
    """
    return float(run.get("deterministic_score", run["deterministic_return"]))


def score_sections(suite: str, runs: list[dict[str, Any]], folder: Path) -> list[str]:
    """
    :param suite: name of the suite
    :param runs: its records
    :param folder: where the plots go
    :return: Markdown: table, learning curves, aggregate, times
    """
    places = list(dict.fromkeys(run["data"] for run in runs))
    stem = f"{suite}_{runs[0]['offline_steps'] + runs[0]['online_steps']}_{runs[0]['evaluations']}_{runs[0]['episodes']}"
    parts = [score_table(runs)]
    for place in places:
        name = f"{stem}_{place.replace('/', '_')}.png"
        save(folder / name, draw_curves([run for run in runs if run["data"] == place], place))
        parts.append(f"![{place}]({name})")
    if suite == "denoising":
        save(folder / f"{stem}.png", draw_denoising(runs))
        parts.append(f"![score and acting time by the number of steps]({stem}.png)")
    elif comparable(runs):
        save(folder / f"{stem}_aggregate.png", draw_aggregate(runs))
        parts.append(f"![interquartile means]({stem}_aggregate.png)")
    parts.append(time_table(runs))
    return parts


def comparable(runs: list[dict[str, Any]]) -> bool:
    """
    :param runs: records of one suite
    :return: whether means over datasets say something: more than one run per algorithm, all of them on the same datasets,
        and scores rather than returns, which have no mean over several tasks
    """
    names, places = ({f(run) for run in runs} for f in (label, lambda run: run["data"]))
    complete = {(label(run), run["data"]) for run in runs} == {(name, place) for name in names for place in places}
    return complete and len(runs) > len(names) and (len(places) == 1 or all("deterministic_score" in run for run in runs))


def score_table(runs: list[dict[str, Any]]) -> str:
    """
    :param runs: records of one suite
    :return: mean and standard deviation over seeds per dataset, beside the behaviour and published scores
    """
    rows = []
    for place in dict.fromkeys(run["data"] for run in runs):
        for name in dict.fromkeys(label(run) for run in runs):
            group = [run for run in runs if run["data"] == place and label(run) == name]
            if not group:
                continue
            scored = "deterministic_score" in group[0]
            row = {
                "data": place,
                "algorithm": name,
                "score" if scored else "return": spread([score_of(run) for run in group]),
                "sampled": spread([run["sampled_score" if scored else "sampled_return"] for run in group]),
                "behaviour": format_number(group[0].get("behaviour_score" if scored else "behaviour_return")),
                "seeds": len(group),
                "published (theirs, D4RL v2)": format_number(published_score(group[0]["algo"], place)),
            }
            rows.append(row)
    return markdown(rows)


def time_table(runs: list[dict[str, Any]]) -> str:
    """
    :param runs: records of one suite
    :return: times of the runs that had the machine to themselves; a sentence if there are none
    """
    alone = [run for run in runs if run.get("processes") == 1]
    if not alone:
        return "Times are left out: the runs shared the machine (`--jobs 1` measures them)."
    rows = []
    for name in dict.fromkeys(label(run) for run in alone):
        group = [run for run in alone if label(run) == name]
        row: dict[str, Any] = {"algorithm": name}
        for phase in ("offline", "online"):
            rates = [run[f"{phase}_seconds"] / run[f"{phase}_steps"] for run in group if run[f"{phase}_steps"]]
            row[f"{phase}: ms per step"] = f"{1000 * np.mean(rates):.2f}" if rates else ""
        row["`predict`, one observation: us"] = f"{np.median([run['acting_us'] for run in group]):.0f}"
        row["threads"] = group[0]["threads"]
        rows.append(row)
    return markdown(rows)


def interquartile_mean(*samples: Any, axis: int = -1) -> Any:
    """
    :param samples: one array of scores per dataset, resampled independently by the bootstrap
    :param axis: axis of the seeds
    :return: mean of the middle half of all scores (Agarwal et al. 2021)
    """
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def aggregate(runs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """
    :param runs: records of one algorithm
    :return: interquartile mean of the scores and its 95 % bootstrap confidence interval, stratified by dataset; the
        interval is not a number where a dataset has a single seed
    """
    from scipy.stats import bootstrap

    groups = [
        np.array([score_of(run) for run in runs if run["data"] == place]) for place in dict.fromkeys(r["data"] for r in runs)
    ]
    mean = float(interquartile_mean(*groups))
    if min(len(group) for group in groups) < 2:
        return mean, float("nan"), float("nan")
    result = bootstrap(groups, interquartile_mean, n_resamples=2000, method="percentile", random_state=0)
    return mean, float(result.confidence_interval.low), float(result.confidence_interval.high)


def draw_aggregate(runs: list[dict[str, Any]]) -> "Figure":
    """
    :param runs: records of one suite
    :return: interquartile mean per algorithm
    """
    names = list(dict.fromkeys(label(run) for run in runs))
    values = np.array([aggregate([run for run in runs if label(run) == name]) for name in names])
    figure, axis = new_figure(height=1 + 0.5 * len(names))
    axis.errorbar(values[:, 0], names, xerr=_bars(values), fmt="o", capsize=4)
    axis.set(xlabel="interquartile mean (95 % bootstrap interval where there are several seeds)")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.4)
    return figure


def _bars(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])).clip(min=0)


def draw_curves(runs: list[dict[str, Any]], title: str) -> "Figure":
    """
    :param runs: records of one dataset or environment
    :param title: its name
    :return: learning curves: mean over seeds, and their range
    """
    figure, axis = new_figure()
    scored = all("score" in point for run in runs for point in run["curve"])
    for name in dict.fromkeys(label(run) for run in runs):
        group = [run for run in runs if label(run) == name]
        offset = {"offline": 0, "online": group[0]["offline_steps"]}
        steps = [offset[point["phase"]] + point["step"] for point in group[0]["curve"]]
        values = np.array([[point["score" if scored else "return"] for point in run["curve"]] for run in group])
        (line,) = axis.plot(steps, values.mean(axis=0), marker="o", label=f"{name} (seeds: {len(group)})")
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
        if group[0]["offline_steps"] and group[0]["online_steps"]:
            axis.axvline(group[0]["offline_steps"], color="black", linestyle=":")
    behaviour = runs[0].get("behaviour_score" if scored else "behaviour_return")
    if behaviour is not None:
        axis.axhline(behaviour, color="grey", linestyle="--", label="behaviour in the data")
    unit = {(True, False): "gradient steps", (False, True): "environment steps"}
    phases = bool(runs[0]["offline_steps"]), bool(runs[0]["online_steps"])
    axis.set(
        title=title,
        xlabel=unit.get(phases, "gradient steps offline, then environment steps online"),
        ylabel="normalized score" if scored else "return",
    )
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    return figure


def draw_denoising(runs: list[dict[str, Any]]) -> "Figure":
    """
    :param runs: records of the denoising suite
    :return: score and acting time by the number of steps
    """
    import ast

    from sb3_consistency.benchmark.suites import STEPS_OPTION

    def n_steps(run: dict[str, Any]) -> int:
        return int(ast.literal_eval(run["options"])[STEPS_OPTION[run["algo"]]])

    figure, axes = new_figure(n_columns=2)
    what: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("score", score_of),
        ("predict, one observation (us)", lambda run: run["acting_us"]),
    ]
    for axis, (title, value) in zip(axes, what, strict=True):
        for algo in dict.fromkeys(run["algo"] for run in runs):
            group = [run for run in runs if run["algo"] == algo]
            x = sorted({n_steps(run) for run in group})
            axis.plot(x, [np.mean([value(r) for r in group if n_steps(r) == n]) for n in x], marker="o", label=algo)
        axis.set(xlabel="network passes per action", ylabel=title, xscale="log", xticks=x, xticklabels=x)
        axis.legend()
    axes[1].set(yscale="log")
    return figure
