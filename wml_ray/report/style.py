"""The style of all tables and plots."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one plot. It is made without pyplot, whose global state is not safe in other threads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    dress(axes, title, x, y)
    return figure, axes


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """Set title, labels, grid and spines."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def log_ticks(axis: Axis) -> None:
    """At most six ticks on a logarithmic axis, so that their labels do not overlap."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 4 * low:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
    axis.set_minor_formatter(NullFormatter())


def count_labels(axis: Axis) -> None:
    """Label an axis with numbers such as 200k and 2.5M."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0+(?=\D|$)|(?<=\.\d)0", "", short_count(value))))


def integer_ticks(axis: Axis) -> None:
    """Ticks at integers only, for an axis of epochs."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))


def legend_below(figure: Figure, all_axes: Iterable[Axes]) -> None:
    """One legend below all plots of a figure, with each label once."""
    handles: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        inches = [0.55 + 0.068 * len(label) for label in handles]
        width = figure.get_figwidth()
        columns = len(inches) if sum(inches) < width else max(1, int(width / max(inches)))
        style: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": "small"}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", **style)


def colours(number: int) -> list[Any]:
    """`number` colours from dark to light."""
    import matplotlib

    return [matplotlib.colormaps["viridis"](0.9 * index / max(number - 1, 1)) for index in range(number)]


def save_figures(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as `<name>.png`; returns the paths."""
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with paths[-1].open("wb") as file:
            figure.savefig(file, format="png", dpi=120)
    return paths


def new_table(*headings: str) -> Table:
    """An empty table; a column `run` is left-aligned and wraps."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    for heading in headings:
        is_name = heading == "run"
        table.add_column(heading, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    return table


def prediction_words(name: str) -> str:
    """`ensemble_weighted` as "weighted ensemble", `peer0` as "peer 0"."""
    if name.startswith("ensemble_"):
        name = f"{name.removeprefix('ensemble_')} ensemble"
    return re.sub(r"(\d+)$", r" \1", name).replace("_", " ")


def percent(share: float) -> str:
    """A share in [0, 1] in per cent, without the sign."""
    return f"{share * 100:.2f}"


def short_count(value: float) -> str:
    """Three significant digits: 272k, 2.53M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.{max(0, 3 - len(str(int(value / size))))}f}{unit}"
    return f"{value:.0f}"
