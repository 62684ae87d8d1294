"""Tables and plots from the records of a benchmark run."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sb3_consistency.benchmark.drawing import format_number, markdown, save, spread, with_interval
from sb3_consistency.benchmark.intervals import (
    BEHAVIOUR,
    Aggregates,
    Run,
    aggregates,
    common_seeds,
    comparable,
    display_names,
    label,
    labels,
    left_out_of_means,
    of_label,
    score_name,
    score_of,
    shared_options,
)
from sb3_consistency.benchmark.jobs import Job, in_order
from sb3_consistency.benchmark.online_report import online_sections
from sb3_consistency.benchmark.planner_suite import planner_section
from sb3_consistency.benchmark.published import SOURCE as PUBLISHED_SOURCE
from sb3_consistency.benchmark.published import published_score
from sb3_consistency.benchmark.records import PACKAGES, Records, had_the_machine
from sb3_consistency.benchmark.score_plots import draw_aggregate, draw_curves, draw_denoising
from sb3_consistency.benchmark.speed_report import scaling_sections, speed_sections

# what a record belongs to
JOB_FIELDS = [field.name for field in fields(Job)]
SUITE_TITLES = {
    "offline": "Offline",
    "online": "Online from scratch",
    "offline-to-online": "Offline, then online",
    "denoising": "Number of denoising steps",
}


def write_report(folder: Path) -> Path:
    """
    Write ``README.md`` with all tables, and the plots, from the folder's records.

    :param folder: folder of the benchmark run
    :return: path of the report
    :raises ValueError: if the folder holds no records
    """
    import pandas as pd

    runs, speed, scaling = (read_rows(folder, kind) for kind in ("runs", "speed", "scaling"))
    runs = latest(runs)
    if not runs and not speed and not scaling:
        raise ValueError(
            f"folder: there are no benchmark records (runs, speed or scaling, as folders or .jsonl) in {folder.resolve()}."
        )
    parts = ["# Benchmark", provenance_lines([*runs, *speed, *scaling])]
    if speed:
        parts += speed_sections(pd.DataFrame(speed), folder)
    if scaling:
        parts += scaling_sections(scaling, folder)
    planners = [run for run in runs if run["suite"] == "planner"]
    if planners:
        parts += ["## Planners", planner_section(planners)]
    for suite, title in SUITE_TITLES.items():
        for budget in dict.fromkeys(budget_of(run) for run in runs if run["suite"] == suite):
            chosen = [run for run in runs if run["suite"] == suite and budget_of(run) == budget]
            parts += [f"## {title}, {budget}", *score_sections(suite, chosen, folder)]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def read_rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """
    :param folder: folder of the benchmark run
    :param kind: "runs", "speed" or "scaling"
    :return: its records; of those that hold figures, the figures
    """
    return [row for record in Records(folder, kind).read() for row in record.get("figures", [record])]


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


def budget_of(run: Run) -> str:
    """
    :param run: record of a run
    :return: how long it trained and how it was evaluated: runs that differ in it are not seeds of each other
    """
    phases = {"offline": run["offline_steps"], "online": run["online_steps"]}
    steps = " + ".join(f"{n} {phase} steps" for phase, n in phases.items() if n)
    return f"{steps}, {run['episodes']} episodes, {run['evaluations']} evaluations"


def score_sections(suite: str, runs: list[Run], folder: Path) -> list[str]:
    """
    :param suite: name of the suite
    :param runs: its records
    :param folder: where the plots go
    :return: Markdown: table, learning curves, aggregate, times
    """
    steps = "+".join(str(n) for n in (runs[0]["offline_steps"], runs[0]["online_steps"]) if n)
    stem = f"{suite}_{steps}_{runs[0]['evaluations']}_{runs[0]['episodes']}"
    shared, names = shared_options(runs), display_names(runs)
    parts = [f"All but other libraries' with `{shared}`."] if shared else []
    parts.append(score_table(suite, runs))
    save(folder / f"{stem}.png", draw_curves(runs))
    parts += [f"![learning curves: mean, and every seed]({stem}.png)"]
    if suite == "denoising":
        for place in dict.fromkeys(run["data"] for run in runs):
            # no link may end at a ":" or "?" of a file's name
            name = f"{stem}_{re.sub(r'[^A-Za-z0-9_.-]+', '_', place)}_steps.png"
            save(folder / name, draw_denoising([run for run in runs if run["data"] == place], place))
            parts.append(f"![{place}: score and times by the number of steps]({name})")
    elif suite == "online":
        parts += online_sections(runs, folder, stem)
    wanted = comparable(runs) if suite != "denoising" else []
    if wanted:
        means = aggregates(runs, wanted)
        save(folder / f"{stem}_aggregate.png", draw_aggregate(means, names, score_name(runs[0])))
        parts += [aggregate_table(runs, means), f"![interquartile means]({stem}_aggregate.png)"]
        parts += left_out_of_means(runs, wanted)
    parts.append(time_table(runs))
    return parts


def score_table(suite: str, runs: list[Run]) -> str:
    """
    :param suite: name of the suite
    :param runs: its records
    :return: mean and standard deviation over seeds per dataset, beside the behaviour and, offline, published scores
    """
    rows, names = [], display_names(runs)
    for place in dict.fromkeys(run["data"] for run in runs):
        for key in labels(runs):
            group = [run for run in of_label(runs, key) if run["data"] == place]
            if not group:
                continue
            same = len({score_name(run) for run in group}) == 1
            what = score_name(group[0]) if same else "return"
            values = {
                acting: [score_of(run, acting) if same else run[f"{acting}_return"] for run in group]
                for acting in ("deterministic", "sampled")
            }
            row = {
                "data": place,
                "algorithm": names[key],
                **{f"{what}, {acting}": spread(numbers) for acting, numbers in values.items()},
                "behaviour": format_number(group[0].get(BEHAVIOUR.get(what, ""))),
                "seeds": len(group),
                "commit": ", ".join(dict.fromkeys(run["commit"] or "unknown" for run in group)),
            }
            if suite == "offline" and what == "normalized score":
                row["published (theirs)"] = format_number(published_score(group[0]["algo"], place))
            rows.append(row)
    footnote = f"\n\nPublished: {PUBLISHED_SOURCE}." if any(row.get("published (theirs)") for row in rows) else ""
    return markdown(rows) + footnote


def aggregate_table(runs: Sequence[Run], means: Aggregates) -> str:
    """
    :param runs: records of one suite
    :param means: see :func:`~sb3_consistency.benchmark.intervals.aggregates`
    :return: interquartile means over datasets and seeds, with their 95 % bootstrap intervals where there are several seeds
    """
    rows, names = [], display_names(runs)
    for key, of_key in means.items():
        group = of_label(runs, key)
        n_seeds = len(common_seeds(group, {run["data"] for run in group}))
        texts = {acting: with_interval(numbers) for acting, numbers in of_key.items()}
        rows.append({"interquartile mean": names[key], **texts, "seeds": n_seeds})
    return markdown(rows)


def time_table(runs: list[Run]) -> str:
    """
    :param runs: records of one suite
    :return: times of the runs that had the machine to themselves; a sentence if there are none
    """
    alone = [run for run in runs if had_the_machine(run)]
    if not alone:
        return "Times are left out: the runs shared the machine (`--jobs 1` on an idle one measures them)."
    rows, names = [], display_names(runs)
    for key, threads in dict.fromkeys((label(run), run["threads"]) for run in alone):
        group = [run for run in alone if (label(run), run["threads"]) == (key, threads)]
        row: dict[str, Any] = {"algorithm": names[key], "threads": threads}
        for phase in ("offline", "online"):
            rates = [run[f"{phase}_seconds"] / run[f"{phase}_steps"] for run in group if run.get(f"{phase}_seconds")]
            row[f"{phase}: ms per step"] = f"{1000 * np.mean(rates):.2f}" if rates else ""
        row["`predict`, one observation: us"] = f"{np.median([run['acting_us'] for run in group]):.0f}"
        rows.append(row)
    defaults = "Networks, batch size and candidates are the defaults but for the options named; actions are sampled."
    return f"{markdown(rows)}\n\n{defaults}"


def latest(runs: Iterable[Run]) -> list[Run]:
    """
    :param runs: records of runs
    :return: of equal jobs the last one's: two records of one seed are not two seeds. The last point of a curve is the final
        evaluation (older records hold one before the last gradient step there)
    """
    what = [*(set(JOB_FIELDS) - {"algo", "options"}), "teacher_steps", "reward_steps"]
    found = list(
        {(label(run), in_order(run.get("student", "")), *(run.get(name) for name in what)): run for run in runs}.values()
    )
    for run in found:
        for point in run.get("curve", [])[-1:]:
            point |= {kind: run[f"deterministic_{kind}"] for kind in ("return", "score") if f"deterministic_{kind}" in run}
    return found
