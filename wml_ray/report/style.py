"""The common style of tables and plots."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """One plot in a figure of its own; without pyplot, whose global state belongs to one thread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    dress(axes, title, x, y)
    return figure, axes


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """The one look of all plots."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def log_ticks(axis: Axis) -> None:
    """As many ticks on a logarithmic axis as their labels have room for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,), numticks=6))
    axis.set_minor_formatter(NullFormatter())


def count_labels(axis: Axis) -> None:
    """Labels such as 200k and 2.5M."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0+(?=\D|$)|(?<=\.\d)0", "", short_count(value))))


def colours(number: int) -> list[Any]:
    """As many colours, from dark to light."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.9 * index / max(number - 1, 1)) for index in range(number)]


def save_figures(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as `<name>.png`."""
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with paths[-1].open("wb") as file:
            figure.savefig(file, format="png", dpi=120)
    return paths


def new_table(*headings: str) -> Table:
    """An empty table in the one look of all tables."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    return table


def prediction_words(name: str) -> str:
    """`ensemble_weighted` as "weighted ensemble", `peer0` as "peer 0"."""
    if name.startswith("ensemble_"):
        name = f"{name.removeprefix('ensemble_')} ensemble"
    return re.sub(r"(\d+)$", r" \1", name).replace("_", " ")


def percent(share: float) -> str:
    """A share in per cent, without the sign."""
    return f"{share * 100:.2f}"


def short_count(value: float) -> str:
    """Three significant digits: 272k, 2.53M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{max(0, 3 - len(str(int(value / size))))}f}{unit}"
    return f"{value:.0f}"
