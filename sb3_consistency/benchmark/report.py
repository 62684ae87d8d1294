"""Tables and plots from the records of a benchmark run."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sb3_consistency.benchmark.drawing import format_number, markdown, save, spread
from sb3_consistency.benchmark.planner import planner_section
from sb3_consistency.benchmark.published import SOURCE as PUBLISHED_SOURCE
from sb3_consistency.benchmark.published import published_score
from sb3_consistency.benchmark.records import PACKAGES, Records, had_the_machine
from sb3_consistency.benchmark.runs import Job
from sb3_consistency.benchmark.score_plots import (
    Aggregates,
    aggregates,
    comparable,
    draw_aggregate,
    draw_curves,
    draw_denoising,
    label,
    score_name,
)
from sb3_consistency.benchmark.speed_report import scaling_sections, speed_sections

# what a record, or a point of a learning curve, belongs to
JOB_FIELDS = [field.name for field in fields(Job)]
SUITE_TITLES = {
    "offline": "Offline",
    "online": "Online from scratch",
    "offline-to-online": "Offline, then online",
    "denoising": "Number of denoising steps",
}


def write_report(folder: Path) -> Path:
    """
    Write ``README.md`` with all tables, ``runs.csv``, ``curves.csv``, ``speed.csv``, and the plots, from the folder's records.

    :param folder: folder of the benchmark run
    :return: path of the report
    :raises ValueError: if the folder holds no records
    """
    import pandas as pd

    runs, speed, scaling = (Records(folder, kind).read() for kind in ("runs", "speed", "scaling"))
    runs = latest(runs)
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
    trained = [run for run in runs if run["suite"] != "planner"]
    if planners:
        parts += ["## Planners", planner_section(planners)]
    if runs:
        rows = [without_lists(run) for run in trained] + planner_rows(planners)
        pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    if trained:
        points = [{**{name: run[name] for name in JOB_FIELDS}, **point} for run in trained for point in run["curve"]]
        pd.DataFrame(points).to_csv(folder / "curves.csv", index=False)
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


def budget_of(run: dict[str, Any]) -> str:
    """
    :param run: record of a run
    :return: how long it trained and how it was evaluated: runs that differ in it are not seeds of each other
    """
    phases = {"offline": run["offline_steps"], "online": run["online_steps"]}
    steps = " + ".join(f"{n} {phase} steps" for phase, n in phases.items() if n)
    return f"{steps}, {run['episodes']} episodes, {run['evaluations']} evaluations"


def score_sections(suite: str, runs: list[dict[str, Any]], folder: Path) -> list[str]:
    """
    :param suite: name of the suite
    :param runs: its records
    :param folder: where the plots go
    :return: Markdown: table, learning curves, aggregate, times
    """
    steps = "+".join(str(n) for n in (runs[0]["offline_steps"], runs[0]["online_steps"]) if n)
    stem = f"{suite}_{steps}_{runs[0]['evaluations']}_{runs[0]['episodes']}"
    parts = [score_table(suite, runs)]
    for place in dict.fromkeys(run["data"] for run in runs):
        here = [run for run in runs if run["data"] == place]
        name = f"{stem}_{place.replace('/', '_')}"
        save(folder / f"{name}.png", draw_curves(here, place))
        parts.append(f"![{place}]({name}.png)")
        if suite == "denoising":
            save(folder / f"{name}_steps.png", draw_denoising(here, place))
            parts.append(f"![{place}: score and times by the number of steps]({name}_steps.png)")
    names = comparable(runs) if suite != "denoising" else []
    if names:
        means = aggregates(runs, names)
        save(folder / f"{stem}_aggregate.png", draw_aggregate(means, score_name(runs[0])))
        parts += [aggregate_table(means), f"![interquartile means]({stem}_aggregate.png)"]
        left_out = [name for name in dict.fromkeys(map(label, runs)) if name not in names]
        if left_out:
            parts.append(f"Left out of the means, as they did not run on all of the data: {'; '.join(left_out)}.")
    parts.append(time_table(runs))
    return parts


def score_table(suite: str, runs: list[dict[str, Any]]) -> str:
    """
    :param suite: name of the suite
    :param runs: its records
    :return: mean and standard deviation over seeds per dataset, beside the behaviour and, offline, published scores
    """
    rows = []
    for place in dict.fromkeys(run["data"] for run in runs):
        for name in dict.fromkeys(label(run) for run in runs):
            group = [run for run in runs if run["data"] == place and label(run) == name]
            if not group:
                continue
            scored = all("deterministic_score" in run for run in group)
            what = "score" if scored else "return"
            row = {
                "data": place,
                "algorithm": name,
                f"{what}, deterministic": spread([run[f"deterministic_{what}"] for run in group]),
                f"{what}, sampled": spread([run[f"sampled_{what}"] for run in group]),
                "behaviour": format_number(group[0].get(f"behaviour_{what}")),
                "seeds": len(group),
                "commit": ", ".join(dict.fromkeys(run["commit"] or "unknown" for run in group)),
            }
            if suite == "offline" and scored:
                row["published (theirs)"] = format_number(published_score(group[0]["algo"], place))
            rows.append(row)
    footnote = f"\n\nPublished: {PUBLISHED_SOURCE}." if any(row.get("published (theirs)") for row in rows) else ""
    return markdown(rows) + footnote


def aggregate_table(means: Aggregates) -> str:
    """
    :param means: see :func:`~sb3_consistency.benchmark.score_plots.aggregates`
    :return: interquartile means over datasets and seeds, with their 95 % bootstrap intervals where there are several seeds
    """
    rows = []
    for name, of_name in means.items():
        row = {"interquartile mean": name}
        for acting, numbers in of_name.items():
            mean, *interval = map(format_number, numbers)
            row[acting] = f"{mean} [{', '.join(interval)}]" if all(interval) else mean
        rows.append(row)
    return markdown(rows)


def time_table(runs: list[dict[str, Any]]) -> str:
    """
    :param runs: records of one suite
    :return: times of the runs that had the machine to themselves; a sentence if there are none
    """
    alone = [run for run in runs if had_the_machine(run)]
    if not alone:
        return "Times are left out: the runs shared the machine (`--jobs 1` on an idle one measures them)."
    rows = []
    for name, threads in dict.fromkeys((label(run), run["threads"]) for run in alone):
        group = [run for run in alone if (label(run), run["threads"]) == (name, threads)]
        row: dict[str, Any] = {"algorithm": name, "threads": threads}
        for phase in ("offline", "online"):
            rates = [run[f"{phase}_seconds"] / run[f"{phase}_steps"] for run in group if run[f"{phase}_steps"]]
            row[f"{phase}: ms per step"] = f"{1000 * np.mean(rates):.2f}" if rates else ""
        row["`predict`, one observation: us"] = f"{np.median([run['acting_us'] for run in group]):.0f}"
        rows.append(row)
    defaults = "Networks, batch size and candidates are the defaults but for the options named; actions are sampled."
    return f"{markdown(rows)}\n\n{defaults}"


def latest(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    :param runs: records of runs
    :return: of equal jobs the last one's: two records of one seed are not two seeds
    """
    what = [*JOB_FIELDS, "student", "teacher_steps", "reward_steps"]
    return list({tuple(run.get(name) for name in what): run for run in runs}.values())


def planner_rows(planners: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    :param planners: records of the planner suite
    :return: a row for every number of passes, with what the run is
    """
    return [{**without_lists(run), **planner} for run in planners for planner in run["planners"]]


def without_lists(run: dict[str, Any]) -> dict[str, Any]:
    """
    :param run: record of a run
    :return: what fits into a cell each
    """
    return {key: value for key, value in run.items() if key not in ("curve", "planners")}
