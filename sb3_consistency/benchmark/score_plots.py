"""Plots of what the training suites found."""

import ast
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_consistency.benchmark.drawing import LINE_OF_TEXT, LineStyle, name_lines, new_figure, styles_of, thousands
from sb3_consistency.benchmark.intervals import (
    ACTINGS,
    BEHAVIOUR,
    Aggregates,
    Run,
    display_names,
    labels,
    of_label,
    point_of,
    score_name,
    score_of,
)
from sb3_consistency.benchmark.records import had_the_machine
from sb3_consistency.benchmark.suites import STEPS_OPTION
from sb3_consistency.registry import colour_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# characters of a line of a name
NAME_WIDTH = 34


def draw_aggregate(means: Aggregates, names: dict[str, str], what: str) -> "Figure":
    """
    :param means: see :func:`~sb3_consistency.benchmark.intervals.aggregates`
    :param names: label -> name for people
    :param what: what the means are of
    :return: interquartile mean per label, a panel each of deterministic and of sampled actions
    """
    figure, axes = new_figure(len(ACTINGS), height=1.4 + 0.35 * len(means))
    for axis, acting in zip(axes, ACTINGS, strict=True):
        for y, (key, of_key) in enumerate(means.items()):
            mean, low, high = of_key[acting]
            axis.plot(mean, y, marker="o", color=colour_of(key))
            axis.plot([low, high], [y, y], linewidth=4, alpha=0.4, color=colour_of(key))
        axis.set(xlabel=f"interquartile mean, {what}", title=acting, ylim=(len(means) - 0.5, -0.5))
        axis.set_yticks(range(len(means)), [fill(names[key], NAME_WIDTH) for key in means] if axis is axes[0] else [])
        axis.grid(alpha=0.4, axis="x")
    return figure


def draw_curves(runs: Sequence[Run]) -> "Figure":
    """
    :param runs: records of one suite and one budget
    :return: a panel per dataset or environment: learning curves of deterministic actions, the seeds as thin lines
    """
    places = list(dict.fromkeys(run["data"] for run in runs))
    names, styles = display_names(runs), styles_of(labels(runs))
    n_lines = sum(fill(name, NAME_WIDTH).count("\n") + 1 for name in names.values())
    figure, axes = new_figure(len(places), height=max(4.2, LINE_OF_TEXT * (n_lines + 4)))
    for axis, place in zip(axes, places, strict=True):
        _draw_panel(axis, [run for run in runs if run["data"] == place], names, styles)
        axis.set_title(place)
    return figure


def _draw_panel(axis: Any, runs: Sequence[Run], names: dict[str, str], styles: dict[str, LineStyle]) -> None:
    scored = all(score_name(run) == score_name(runs[0]) for run in runs)
    ends = []
    for key in labels(runs):
        group, colour = of_label(runs, key), colour_of(key)
        offset = {"offline": 0, "online": group[0]["offline_steps"]}
        steps = [offset[point["phase"]] + point["step"] for point in group[0]["curve"]]
        values = np.array([[point_of(point) if scored else point["return"] for point in run["curve"]] for run in group])
        for seed in values if len(group) > 1 else []:
            axis.plot(steps, seed, color=colour, linewidth=0.6, alpha=0.5)
        axis.plot(steps, values.mean(axis=0), color=colour, linestyle=styles[key], linewidth=2)
        ends.append((float(values.mean(axis=0)[-1]), fill(names[key], NAME_WIDTH), colour))
        if group[0]["offline_steps"] and group[0]["online_steps"]:
            axis.axvline(group[0]["offline_steps"], color="black", linestyle=":")
    what = score_name(runs[0]) if scored else "return"
    behaviour = runs[0].get(BEHAVIOUR.get(what, ""))
    if behaviour is not None:
        axis.axhline(behaviour, color="grey", linestyle="--", linewidth=1)
        ends.append((behaviour, "behaviour in the data", "grey"))
    unit = {(True, False): "gradient steps", (False, True): "environment steps"}
    phases = bool(runs[0]["offline_steps"]), bool(runs[0]["online_steps"])
    axis.set(xlabel=unit.get(phases, "gradient steps offline, then environment steps online"), ylabel=what)
    axis.grid(alpha=0.4)
    thousands(axis)
    name_lines(axis, ends)


def draw_denoising(runs: Sequence[Run], title: str) -> "Figure":
    """
    :param runs: records of the denoising suite on one dataset
    :param title: its name
    :return: score, and acting and training time of runs that had the machine to themselves, by the number of steps
    """

    def without_steps(run: Run) -> Run:
        options = ast.literal_eval(run["options"])
        return {**run, "passes": int(options.pop(STEPS_OPTION[run["algo"]])), "options": repr(options)}

    runs = [without_steps(run) for run in runs]
    timed = [run for run in runs if had_the_machine(run)]
    panels: list[tuple[str, Sequence[Run], Callable[[Run], float]]] = [
        (score_name(runs[0]), runs, score_of),
        ("predict, one observation: us", timed, lambda run: float(run["acting_us"])),
        ("gradient step: ms", timed, lambda run: float(1000 * run["offline_seconds"] / run["offline_steps"])),
    ]
    panels = [panel for panel in panels if panel[1]]
    names, styles = display_names(runs), styles_of(labels(runs))
    figure, axes = new_figure(len(panels))
    every_n = sorted({run["passes"] for run in runs})
    for axis, (ylabel, chosen, value) in zip(axes, panels, strict=True):
        axis.set(
            xlabel="network passes per action", ylabel=ylabel, xscale="log", yscale="linear" if axis is axes[0] else "log"
        )
        ends = []
        for key in labels(chosen):
            points: dict[int, list[float]] = {}
            for run in of_label(chosen, key):
                points.setdefault(run["passes"], []).append(value(run))
            means = {n: float(np.mean(values)) for n, values in sorted(points.items())}
            axis.plot(list(means), list(means.values()), marker="o", color=colour_of(key), linestyle=styles[key])
            for n, values in points.items():
                axis.plot([n] * len(values), values, ".", color=colour_of(key), alpha=0.5)
            ends.append((list(means.values())[-1], fill(names[key], NAME_WIDTH), colour_of(key)))
        axis.set_xticks(every_n, [str(n) for n in every_n])
        axis.minorticks_off()
        axis.grid(alpha=0.4)
        name_lines(axis, ends)
    figure.suptitle(title)
    return figure


def draw_online(scores: dict[str, np.ndarray], names: dict[str, str], steps: Sequence[int]) -> "Figure":
    """
    :param scores: label -> normalised scores, (runs, evaluations)
    :param names: label -> name for people
    :param steps: environment steps of the evaluations
    :return: interquartile mean over environments and seeds against steps
    """
    from sb3_consistency.benchmark.intervals import interquartile_mean

    figure, (axis,) = new_figure()
    ends, styles = [], styles_of(list(scores))
    for key, values in scores.items():
        means = interquartile_mean(values, axis=0)
        axis.plot(steps, means, color=colour_of(key), linestyle=styles[key], linewidth=2)
        ends.append((float(means[-1]), fill(names[key], NAME_WIDTH), colour_of(key)))
    axis.set(xlabel="environment steps", ylabel="interquartile mean\n(return - random) / (SAC's final - random)")
    axis.axhline(1, color="grey", linestyle="--", linewidth=1)
    axis.grid(alpha=0.4)
    thousands(axis)
    name_lines(axis, ends)
    return figure
