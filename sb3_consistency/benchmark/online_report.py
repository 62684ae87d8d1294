"""The online suite over several environments: scores relative to SAC, and what a step costs."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sb3_consistency.benchmark.drawing import format_number, markdown, save, with_interval
from sb3_consistency.benchmark.intervals import (
    LAST,
    Reference,
    Run,
    area_under_curve,
    best_return,
    common_seeds,
    cpu_seconds_to,
    display_names,
    estimate,
    final_return,
    grouped,
    label_of_sac,
    labels,
    left_out_of_means,
    of_label,
    references,
)
from sb3_consistency.benchmark.score_plots import draw_online


def online_sections(runs: list[Run], folder: Path, stem: str) -> list[str]:
    """
    :param runs: records of the online suite, of one budget
    :param folder: where the plot goes
    :param stem: beginning of its name
    :return: Markdown: interquartile means over environments and seeds, and CPU time; nothing where SAC or the returns of a
        random policy are missing
    """
    known = references(runs)
    left_out = [place for place in dict.fromkeys(run["data"] for run in runs) if place not in known]
    runs = [run for run in runs if run["data"] in known]
    places = list(known)
    wanted = [key for key in labels(runs) if common_seeds(of_label(runs, key), set(places))] if runs else []
    if len(wanted) < 2:
        return []
    sac = label_of_sac(runs)
    sac = sac if sac in wanted else None
    names, measures = display_names(runs), {"final": final_return, "area under the curve": area_under_curve}

    def scores(key: str, measure: str) -> list[np.ndarray]:
        return grouped(of_label(runs, key), lambda run: known[run["data"]].score(measures[measure](run)), places)

    rows = []
    for key in wanted:
        row = {"algorithm": names[key]}
        for measure in measures:
            row[measure] = with_interval(estimate(scores(key, measure)), 2)
            against = [] if sac in (None, key) else scores(str(sac), measure)
            difference = with_interval(estimate(scores(key, measure), against), 2) if against else ""
            row[f"{measure}: minus SAC's"] = difference
        row["seeds"] = str(len(common_seeds(of_label(runs, key), set(places))))
        row["CPU ms per step"] = _cpu_milliseconds(of_label(runs, key))
        row["CPU to SAC's final"] = _cpu_to_sacs_final(of_label(runs, key), of_label(runs, str(sac)), known)
        rows.append(row)
    curves = {}
    for key in wanted:
        mine = of_label(runs, key)
        seeds = common_seeds(mine, set(places))
        curves[key] = np.array(
            [[known[run["data"]].score(point["return"]) for point in run["curve"]] for run in mine if run["seed"] in seeds]
        )
    save(folder / f"{stem}_normalised.png", draw_online(curves, names, [point["step"] for point in runs[0]["curve"]]))
    text = (
        f"Interquartile means over {len(places)} environments and the seeds, with 95 % intervals (bootstrap over the seeds of "
        "every environment). Scores are (return - random) / (SAC's mean final return - random); final is the mean of the last "
        f"{LAST} evaluations, area the mean of all. CPU time leaves evaluations out. That to SAC's final return is told "
        f"in whole runs of SAC: until the mean of {LAST} evaluations is as high, and where it never is, twice the whole run."
    )
    parts = ["### Relative to SAC", text, markdown(rows), f"![relative to SAC]({stem}_normalised.png)"]
    parts += _by_environment({key: of_label(runs, key) for key in wanted}, names, sac, known)
    parts += left_out_of_means(runs, wanted)
    if left_out:
        parts.append(f"Left out: {', '.join(left_out)} (no run of SAC, no return of a random policy, or SAC learned nothing).")
    return parts


def _by_environment(
    runs: dict[str, list[Run]], names: dict[str, str], sac: str | None, known: dict[str, Reference]
) -> list[str]:
    rows = []
    for place, reference in known.items():
        for key, mine in runs.items():
            row = {"environment": place, "algorithm": names[key]}
            for title, measure in {"final": final_return, "area": area_under_curve}.items():
                returns = grouped(mine, measure, [place])
                row[title] = with_interval(estimate(returns), 0)
                against = [] if sac in (None, key) else grouped(runs[str(sac)], measure, [place])
                row[f"{title}: minus SAC's"] = with_interval(estimate(returns, against), 0) if against else ""
            ends = [
                (reference.score(final_return(run)), reference.score(best_return(run))) for run in mine if run["data"] == place
            ]
            row["least kept"] = format_number(min((end / best for end, best in ends if best > 0), default=math.nan), 2)
            rows.append(row)
    text = (
        f"Returns, means over the seeds. Kept is the final return's share of the best mean of {LAST} evaluations in a row, "
        "both above the random policy's."
    )
    return ["### By environment", text, markdown(rows)]


def _timed(run: Run) -> bool:
    return "online_cpu_seconds" in run and not run.get("resumed")


def _cpu_to_sacs_final(runs: Sequence[Run], of_sac: Sequence[Run], known: dict[str, Reference]) -> str:
    if not (of_sac and all(map(_timed, [*runs, *of_sac]))):
        return ""
    seconds = {p: np.mean([run["online_cpu_seconds"] for run in of_sac if run["data"] == p]) for p in known}

    def share(run: Run) -> float:
        return float(cpu_seconds_to(run, known[run["data"]].sac) / seconds[run["data"]])

    return with_interval(estimate(grouped(runs, share, list(known))), 2)


def _cpu_milliseconds(runs: Sequence[Run]) -> str:
    whole = [run for run in runs if _timed(run)]
    each = [1000 * run["online_cpu_seconds"] / run["online_steps"] for run in whole]
    return f"{np.mean(each):.2f}" if each else ""
