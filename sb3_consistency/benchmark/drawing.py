"""Tables and figures, whatever is in them."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# characters of a line, and inches from one to the next
LEGEND_WIDTH, LINE_HEIGHT = 100, 0.19


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


def format_number(value: float | None) -> str:
    """
    :param value: number or None
    :return: one decimal, none from 1000 on; empty for None
    """
    if value is None or np.isnan(value):
        return ""
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def legend_below(figure: "Figure", axis: Any) -> None:
    """
    Put the legend under the figure, however long its texts are, and give the figure the height for it.

    :param figure: figure
    :param axis: panel whose lines it names
    """
    lines, names = axis.get_legend_handles_labels()
    names = [fill(name.replace("`", ""), LEGEND_WIDTH) for name in names]
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LINE_HEIGHT * sum(name.count("\n") + 1 for name in names))
    figure.legend(lines, names, loc="outside lower center", fontsize="small")


def new_figure(n_columns: int = 1, height: float = 5.5) -> tuple["Figure", Any]:
    """
    :param n_columns: number of panels side by side
    :param height: height in inches
    :return: figure and its panel or panels; drawn without a display
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if n_columns == 1 else 12, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, n_columns)


def save(path: Path, figure: "Figure") -> None:
    """
    :param path: PNG to write
    :param figure: figure
    """
    figure.savefig(path, dpi=120)
