"""Tables and figures, whatever is in them: the same colour for an algorithm everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_consistency.registry import colour_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LineStyle = str | tuple[int, tuple[int, ...]]
# of an algorithm with several settings in a figure, as many as the denoising suite has
STYLES: tuple[LineStyle, ...] = ("-", "--", ":", "-.", (0, (8, 2, 1, 2, 1, 2)))
# height of a line of text beside a panel, in inches
LINE_OF_TEXT = 0.27


def styles_of(labels: Sequence[str]) -> dict[str, LineStyle]:
    """
    :param labels: algorithms, with or without settings
    :return: label -> style of its lines: of one algorithm's settings, which have one colour, each has another
    """
    seen: dict[str, int] = {}
    styles = {}
    for label in labels:
        colour = colour_of(label)
        styles[label] = STYLES[seen.setdefault(colour, 0) % len(STYLES)]
        seen[colour] += 1
    return styles


def markdown(rows: list[dict[str, Any]]) -> str:
    """
    :param rows: rows of a table, texts by column
    :return: the table, without the columns that are empty
    """
    import pandas as pd

    frame = pd.DataFrame(rows).fillna("")
    return str(frame.loc[:, (frame != "").any()].to_markdown(index=False, disable_numparse=True))


def spread(values: Sequence[float]) -> str:
    """
    :param values: one value per seed
    :return: mean and, for several, standard deviation
    """
    mean = format_number(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ± {format_number(float(np.std(values, ddof=1)))}"


def format_number(value: float | None, decimals: int = 1) -> str:
    """
    :param value: number or None
    :param decimals: decimals, of numbers below 1000
    :return: the number; empty for None
    """
    if value is None or np.isnan(value):
        return ""
    return f"{value:.{decimals}f}" if abs(value) < 1000 else f"{value:.0f}"


def with_interval(numbers: Sequence[float], decimals: int = 1) -> str:
    """
    :param numbers: a mean, and the bounds of its interval, which may be no numbers
    :param decimals: decimals
    :return: "mean [low, high]"
    """
    mean, *interval = (format_number(number, decimals) for number in numbers)
    return f"{mean} [{', '.join(interval)}]" if all(interval) else mean


def name_lines(axis: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """
    Write names beside the ends of lines, in their colours, none over another.

    :param axis: panel; its limits must not change any more
    :param ends: last value, name and colour of every line
    """
    axis.set_ylim(axis.get_ylim())
    # as a share of the panel's height, whatever its scale is
    to_panel = axis.transScale + axis.transLimits
    x = axis.get_xlim()[1]
    heights = np.array([float(to_panel.transform((x, y))[1]) for y, _, _ in ends])
    line = LINE_OF_TEXT * axis.get_gridspec().nrows / axis.figure.get_size_inches()[1]
    needed = np.array([line * (name.count("\n") + 1) for _, name, _ in ends])
    order, above = np.argsort(heights), -np.inf
    for i in order:
        heights[i] = max(heights[i], above + needed[i] / 2)
        above = heights[i] + needed[i] / 2
    # what was pushed out of the panel comes down again, and pushes
    below = max(1.0, float(needed.sum()))
    for i in order[::-1]:
        heights[i] = min(heights[i], below - needed[i] / 2)
        below = heights[i] - needed[i] / 2
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axis.text(1.02, height, name, color=colour, transform=axis.transAxes, fontsize="small", verticalalignment="center")


def thousands(axis: Any) -> None:
    """
    :param axis: panel whose steps are written in thousands, few of them
    """
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")


def new_figure(n_panels: int = 1, height: float = 4.2, width: float = 8.0, n_columns: int = 3) -> tuple["Figure", list[Any]]:
    """
    :param n_panels: number of panels
    :param height: height of a row in inches
    :param width: width of a single panel in inches; several are narrower
    :param n_columns: panels side by side, at most
    :return: figure and its panels; drawn without a display
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(n_panels, n_columns)
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(width if columns == 1 else 6.0 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for empty in panels[n_panels:]:
        empty.set_axis_off()
    return figure, panels[:n_panels]


def save(path: Path, figure: "Figure") -> None:
    """
    :param path: PNG to write
    :param figure: figure
    """
    figure.savefig(path, dpi=100)
