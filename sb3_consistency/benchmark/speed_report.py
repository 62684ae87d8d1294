"""Tables and plots of the speed and scaling suites."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_consistency.benchmark.drawing import markdown, name_lines, new_figure, save
from sb3_consistency.benchmark.load import LOAD_LIMIT
from sb3_consistency.benchmark.speed import ACTION_SIZE, BATCH_SIZE, OBSERVATION_SIZE, WIDTHS
from sb3_consistency.registry import colour_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SPEED_REFERENCES = ("SAC", "DiffusionQL (T = 5)", "DiffusionQL (T = 50)", "DiffusionQL (T = 100)")
EXPORTED = "exported as ONNX, in ONNX Runtime, noise drawn by NumPy"


def speed_sections(frame: "pd.DataFrame", folder: Path) -> list[str]:
    """
    :param frame: the records of the speed suite
    :param folder: where the plots go
    :return: Markdown: a table per device, number of threads and figure, with ratios
    """
    # ratios hold within a run only: of several, the last one of a setting counts
    frame = frame[frame["run"] == frame.groupby(["device", "threads"])["run"].transform("last")]
    parts = ["## Speed"]
    if (frame["load_percent"] > LOAD_LIMIT).any():
        parts.append("**Measured on a loaded machine: these figures mean little.**")
    parts.append(
        "Ratios say how many times as fast as the reference a system is, in the same run; the references act without "
        f"candidates. Observations of {OBSERVATION_SIZE} and actions of {ACTION_SIZE} numbers, "
        f"networks of {len(WIDTHS)} x {WIDTHS[0]}, gradient steps of batch {BATCH_SIZE}."
    )
    for (device, threads), setting in frame.groupby(["device", "threads"]):
        place = f"{device}, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device
        training = setting[setting["what"] == "gradient step"]
        parts += [f"### Gradient steps, {place}", ratio_table(training, steps_per_second=True)]
        acting = setting[setting["what"] != "gradient step"]
        for (what, batch), group in acting.groupby(["what", "batch"], sort=False):
            parts.append(f"### Acting, {place}: {EXPORTED if what == 'exported' else what}, batch {batch}")
            predict = acting[(acting["what"] == "predict") & (acting["batch"] == batch)] if what == "exported" else None
            parts.append(ratio_table(group, predict=predict))
        name = f"speed_{device}_{threads}.png"
        save(folder / name, draw_speed(training, place))
        parts.append(f"![gradient steps, {place}]({name})")
    return parts


def ratio_table(group: "pd.DataFrame", steps_per_second: bool = False, predict: "pd.DataFrame | None" = None) -> str:
    """
    :param group: figures of one kind
    :param steps_per_second: show the rate and not the time
    :param predict: times of ``predict`` to compare each system's with
    :return: Markdown table; systems that draw candidates are compared with references that don't
    """
    times = _without_candidates(group)
    references = {name: times[name] for name in SPEED_REFERENCES if name in times}
    own = {} if predict is None else _without_candidates(predict)
    rows = []
    for _, figure in group.iterrows():
        row: dict[str, Any] = {"system": figure["system"]}
        if figure.get("candidates", 0) > 1:
            row["system"] += f", {figure['candidates']:.0f} candidates"
        if steps_per_second:
            row["steps/s"] = f"{1e6 / figure['median_us']:.1f}"
        else:
            row |= {"median us": f"{figure['median_us']:.0f}", "95 % us": f"{figure['p95_us']:.0f}"}
        if figure["system"] in own:
            row["x its predict"] = f"{own[figure['system']] / figure['median_us']:.2f}"
        for name, reference in references.items():
            row[f"x {name}"] = f"{reference / figure['median_us']:.2f}"
        rows.append(row)
    return markdown(rows)


def _without_candidates(group: "pd.DataFrame") -> dict[str, float]:
    plain = group[~(group["candidates"] > 1)] if "candidates" in group else group
    return dict(zip(plain["system"], plain["median_us"], strict=True))


def draw_speed(training: "pd.DataFrame", place: str) -> "Figure":
    """
    :param training: gradient step figures of one setting
    :param place: name of the setting
    :return: rates relative to SAC
    """
    sac = training.loc[training["system"] == "SAC", "median_us"].iloc[-1]
    figure, (axis,) = new_figure(height=1.5 + 0.35 * len(training))
    bars = axis.barh(training["system"], sac / training["median_us"], color=[colour_of(name) for name in training["system"]])
    axis.axvline(1, color="grey", linestyle="--")
    axis.bar_label(bars, fmt="%.2f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.margins(x=0.1)
    axis.set(xlabel="gradient steps per second, relative to SAC", title=place)
    axis.invert_yaxis()
    return figure


def scaling_sections(records: list[dict[str, Any]], folder: Path) -> list[str]:
    """
    :param records: the records of the scaling suite, of one or several runs; of every axis the last run counts
    :param folder: where the plot goes
    :return: Markdown: step time against every size, and the memory that a large dataset takes
    """
    newest = {record["axis"]: record["run"] for record in records}
    last = [record for record in records if record["run"] == newest[record["axis"]]]
    steps = [record for record in last if record["axis"] != "memory"]
    parts = ["## Scaling"]
    if any(record["load_percent"] > LOAD_LIMIT for record in last):
        parts.append("**Measured on a loaded machine: these figures mean little.**")
    for axis in dict.fromkeys(record["axis"] for record in steps):
        chosen = [record for record in steps if record["axis"] == axis]
        online, rows = "cpu_us" in chosen[0], []
        for system in dict.fromkeys(record["system"] for record in chosen):
            mine = [record for record in chosen if record["system"] == system]
            if not online:
                rows.append({"system": system, **{f"{r['value']:g}": f"{r['median_us'] / 1000:.3g}" for r in mine}})
                continue
            rows.append({"system": system, **{f"{r['value']:g}": f"{1e6 / r['median_us']:.0f}" for r in mine}})
            what = f"{system}, per second of processor time"
            rows.append({"system": what, **{f"{r['value']:g}": f"{1e6 / r['cpu_us']:.0f}" for r in mine}})
        unit = "Environment steps per second" if online else "Milliseconds"
        parts += [f"### {unit} against {axis}, {chosen[0]['threads']} thread", markdown(rows)]
    if steps:
        save(folder / "scaling.png", draw_scaling(steps))
        parts.append("![scaling](scaling.png)")
    memory = [record for record in last if record["axis"] == "memory"]
    if memory:
        parts += ["### An offline dataset", markdown([_memory_row(record) for record in memory])]
    return parts


def _memory_row(record: dict[str, Any]) -> dict[str, str]:
    return {
        "transitions": f"{record['value']:,}",
        "replay buffer: MB": f"{record['buffer_bytes'] / 1e6:.0f}",
        "peak while loading and training: MB more than before": f"{record['extra_bytes'] / 1e6:.0f}",
        "ratio": f"{record['extra_bytes'] / record['buffer_bytes']:.2f}",
        "loading and first gradient step: s": f"{record['seconds']:.1f}",
    }


def draw_scaling(records: list[dict[str, Any]]) -> "Figure":
    """
    :param records: step times, of one run per axis
    :return: a panel per axis, time against size, both logarithmic
    """
    axes = list(dict.fromkeys(record["axis"] for record in records))
    figure, panels = new_figure(len(axes))
    for axis, panel in zip(axes, panels, strict=True):
        chosen = [record for record in records if record["axis"] == axis]
        ends = []
        for system in dict.fromkeys(record["system"] for record in chosen):
            points = [(r["value"], r["median_us"] / 1000) for r in chosen if r["system"] == system]
            panel.loglog(*zip(*points, strict=True), marker="o", color=colour_of(system))
            ends.append((points[-1][1], system, colour_of(system)))
        panel.set(xlabel=axis, ylabel="ms")
        name_lines(panel, ends)
    return figure
