"""Plots of what the training suites found."""

import ast
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_consistency.benchmark.drawing import legend_below, new_figure
from sb3_consistency.benchmark.records import had_the_machine
from sb3_consistency.benchmark.suites import STEPS_OPTION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# how an evaluation acts
ACTINGS = ("deterministic", "sampled")
#: mean and bounds of its interval, by name and way to act
Aggregates = dict[str, dict[str, tuple[float, float, float]]]


def label(run: dict[str, Any]) -> str:
    """
    :param run: record of a run
    :return: its algorithm and options, as the tables name them
    """
    return str(run["algo"]) + ("" if run["options"] == "{}" else f" `{run['options'][1:-1]}`")


def score_of(run: dict[str, Any], acting: str = "deterministic") -> float:
    """
    :param run: record of a run
    :param acting: "deterministic" or "sampled" actions
    :return: normalized score of these actions; their return where the data has no reference returns
    """
    return float(run.get(f"{acting}_score", run[f"{acting}_return"]))


def score_name(run: dict[str, Any]) -> str:
    """
    :param run: record of a run
    :return: what :func:`score_of` gives, as axes name it
    """
    return "normalized score" if "deterministic_score" in run else "return"


def comparable(runs: Sequence[dict[str, Any]]) -> list[str]:
    """
    :param runs: records of one suite
    :return: labels of what can be compared by means over datasets: those that ran on all of the datasets; none where only
        one did or has several runs, or where there are returns, which have no mean over several tasks
    """
    places = {run["data"] for run in runs}
    if len(places) > 1 and not all("deterministic_score" in run for run in runs):
        return []
    names = [name for name in dict.fromkeys(map(label, runs)) if common_seeds([r for r in runs if label(r) == name], places)]
    return names if len(names) > 1 and sum(label(run) in names for run in runs) > len(names) else []


def common_seeds(runs: Sequence[dict[str, Any]], places: set[str]) -> set[int]:
    """
    :param runs: records of one algorithm
    :param places: datasets or environments
    :return: seeds that ran on all of them: with more seeds on some, these would count for more in a mean
    """
    return set.intersection(*({run["seed"] for run in runs if run["data"] == place} for place in places))


def interquartile_mean(*samples: Any, axis: int = -1) -> Any:
    """
    :param samples: one array of scores per dataset, resampled independently by the bootstrap
    :param axis: axis of the seeds
    :return: mean of the middle half of all scores (Agarwal et al. 2021); of fewer than four, of all
    """
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def aggregate(runs: Sequence[dict[str, Any]], acting: str = "deterministic") -> tuple[float, float, float]:
    """
    :param runs: records of one algorithm
    :param acting: "deterministic" or "sampled" actions
    :return: interquartile mean of the scores of the seeds that ran on all datasets, and its 95 % bootstrap confidence
        interval, stratified by dataset; the interval is not a number where there is a single seed
    """
    from scipy.stats import bootstrap

    places = dict.fromkeys(run["data"] for run in runs)
    seeds = common_seeds(runs, set(places))
    chosen = [[run for run in runs if run["data"] == place and run["seed"] in seeds] for place in places]
    groups = [np.array([score_of(run, acting) for run in group]) for group in chosen]
    mean = float(interquartile_mean(*groups))
    if len(seeds) < 2:
        return mean, float("nan"), float("nan")
    result = bootstrap(groups, interquartile_mean, n_resamples=2000, method="percentile", random_state=0)
    return mean, float(result.confidence_interval.low), float(result.confidence_interval.high)


def aggregates(runs: Sequence[dict[str, Any]], names: Sequence[str]) -> Aggregates:
    """
    :param runs: records of one suite
    :param names: labels to compare
    :return: :func:`aggregate` of deterministic and of sampled actions, by the label and its number of seeds
    """
    means = {}
    for name in names:
        group = [run for run in runs if label(run) == name]
        n_seeds = len(common_seeds(group, {run["data"] for run in group}))
        means[f"{name} (seeds: {n_seeds})"] = {acting: aggregate(group, acting) for acting in ACTINGS}
    return means


def draw_aggregate(means: Aggregates, what: str) -> "Figure":
    """
    :param means: see :func:`aggregates`
    :param what: see :func:`score_name`
    :return: interquartile mean per label, a panel each of deterministic and of sampled actions
    """
    figure, axes = new_figure(n_columns=2, height=1.2 + 0.4 * len(means))
    for axis, acting in zip(axes, ACTINGS, strict=True):
        for y, (name, of_name) in enumerate(means.items()):
            mean, low, high = of_name[acting]
            error = np.nan_to_num([[mean - low], [high - mean]]).clip(min=0)
            axis.errorbar([mean], [y], xerr=error, fmt="o", capsize=4, label=name)
        axis.set(
            xlabel=f"interquartile mean, {what}, {acting} actions\n(95 % bootstrap interval where there are several seeds)",
            yticks=[],
            ylim=(len(means) - 0.5, -0.5),
        )
        axis.grid(axis="x", alpha=0.4)
    legend_below(figure, axes[0])
    return figure


def draw_curves(runs: Sequence[dict[str, Any]], title: str) -> "Figure":
    """
    :param runs: records of one dataset or environment
    :param title: its name
    :return: learning curves: mean over seeds, and their range
    """
    figure, axis = new_figure(height=4.5)
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
        ylabel=("normalized score" if scored else "return") + ", deterministic actions\n(mean and range of the seeds)",
    )
    axis.grid(alpha=0.4)
    legend_below(figure, axis)
    return figure


def draw_denoising(runs: Sequence[dict[str, Any]], title: str) -> "Figure":
    """
    :param runs: records of the denoising suite on one dataset
    :param title: its name
    :return: score, and acting and training time of runs that had the machine to themselves, by the number of steps
    """

    def split(run: dict[str, Any]) -> tuple[str, int]:
        options = ast.literal_eval(run["options"])
        n_steps = int(options.pop(STEPS_OPTION[run["algo"]]))
        return label({**run, "options": repr(options)}), n_steps

    def milliseconds(run: dict[str, Any]) -> float:
        return float(1000 * run["offline_seconds"] / run["offline_steps"])

    timed = [run for run in runs if had_the_machine(run)]
    panels: list[tuple[str, Sequence[dict[str, Any]], Callable[[dict[str, Any]], float]]] = [
        (score_name(runs[0]), runs, score_of),
        ("predict, one observation: us", timed, lambda run: float(run["acting_us"])),
        ("gradient step: ms", timed, milliseconds),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure, axes = new_figure(n_columns=len(panels), height=4.0)
    axes = np.atleast_1d(axes)
    every_n = sorted({split(run)[1] for run in runs})
    for axis, (ylabel, chosen, value) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(split(run)[0] for run in chosen):
            points: dict[int, list[float]] = {}
            for run in chosen:
                if split(run)[0] == name:
                    points.setdefault(split(run)[1], []).append(value(run))
            means = {n: float(np.mean(values)) for n, values in sorted(points.items())}
            (line,) = axis.plot(list(means), list(means.values()), marker="o", label=name)
            ranges = [(min(points[n]), max(points[n])) for n in means]
            axis.fill_between(list(means), *zip(*ranges, strict=True), alpha=0.2, color=line.get_color())
        axis.set(xlabel="network passes per action", ylabel=ylabel, xscale="log")
        axis.set_xticks(every_n, [str(n) for n in every_n])
        axis.minorticks_off()
        axis.grid(alpha=0.4)
    for axis in axes[1:]:
        axis.set(yscale="log")
    figure.suptitle(title)
    legend_below(figure, axes[0])
    return figure
