"""The tables of a comparison for a terminal, LaTeX, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wml_ray.errors import UserError, number_of
from wml_ray.report.comparison import COST_REFERENCE, COSTS, Estimate, Row, clear_best, quantities

SPLIT_WORDS = {"test": "Test", "val": "Validation"}
BEST_NOTE = "* (bold) is the best of its column where its interval lies above those of all other rows"


@dataclass(frozen=True)
class TextTable:
    """A table as text; the first column has names. `best` are (row, column) of the cells in bold."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def comparison_tables(rows: Sequence[Row], settings: Mapping[str, str], published: str = "") -> list[TextTable]:
    """All tables of a comparison that have rows. `settings` are the settings of each row in which the rows differ."""
    tables = [
        _accuracies(rows, "test", published),
        _differences(rows, "test"),
        _accuracies(rows, "val"),
        _differences(rows, "val"),
        _costs(rows),
    ]
    if any(settings.values()):
        chosen = [[row.name, settings.get(row.name, "")] for row in rows]
        tables.append(TextTable("Settings", ["method", "settings"], chosen))
    return [table for table in tables if table.rows]


def text_of(estimate: Estimate | None, mean_format: str = "z.2f", factor: float = 100.0) -> str:
    """`98.61 ± 0.25`: an estimate times `factor` and its interval; empty where there is none."""
    if estimate is None or math.isnan(estimate.mean):
        return ""
    mean, half_width = factor * estimate.mean, factor * estimate.half_width
    half = "" if math.isnan(half_width) else f" ± {half_width:{mean_format.removeprefix('+')}}"
    return f"{mean:{mean_format}}{half}"


def aligned(table: TextTable) -> str:
    """A table with its title as aligned plain text. The best cells have a star."""
    starred = [
        [f"{cell}{'*' if (index, column) in table.best else ' ' * bool(column)}" for column, cell in enumerate(cells)]
        for index, cells in enumerate(table.rows)
    ]
    lines = [heading.split("\n") for heading in table.headings]
    height = max(map(len, lines))
    columns = [[""] * (height - len(part)) + part for part in lines]
    head = [[f"{columns[i][j]}{' ' * bool(i)}" for i in range(len(columns))] for j in range(height)]
    widths = [max(len(cells[index]) for cells in [*head, *starred]) for index in range(len(columns))]
    left = table.headings[1:] == ["settings"]

    def line(cells: Sequence[str]) -> str:
        placed = [f"{cell:<{width}}" if left else f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return f" {'  '.join([f'{cells[0]:<{widths[0]}}', *placed[1:]])}".rstrip()

    rule = f" {'─' * (sum(widths) + 2 * (len(widths) - 1))}"
    return "\n".join([table.title, *map(line, head), rule, *map(line, starred)])


def markdown(table: TextTable) -> str:
    """A table as Markdown, the best cells in bold."""
    head = [" ".join(heading.split()) for heading in table.headings]
    body = [
        [f"**{cell}**" if (index, column) in table.best else cell for column, cell in enumerate(cells)]
        for index, cells in enumerate(table.rows)
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join([table.title, "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def latex(table: TextTable) -> str:
    """A table in LaTeX for the package booktabs, the best cells in bold."""

    def escaped(text: str) -> str:
        text = re.sub(r"([&%$#_{}])", r"\\\1", " ".join(text.split())).replace("±", r"$\pm$").replace("×", r"$\times$")
        return re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)

    body = [
        [rf"\textbf{{{escaped(cell)}}}" if (i, j) in table.best else escaped(cell) for j, cell in enumerate(cells)]
        for i, cells in enumerate(table.rows)
    ]
    lines = [[escaped(heading) for heading in table.headings], *body]
    rows = [rf"{' & '.join(cells)} \\" for cells in lines]
    inside = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    columns = "l" + "r" * (len(table.headings) - 1)
    return "\n".join([f"% {table.title}", rf"\begin{{tabular}}{{{columns}}}", *inside, r"\end{tabular}"])


def tidy_csv(rows: Sequence[Row]) -> str:
    """One line for each row and metric: mean, interval and difference to the first row, in the metric's own unit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "metric", "runs", "mean", "half_width", "difference", "difference_half_width"])
    for row in rows:
        for metric, one in {**row.accuracies, **row.costs}.items():
            difference = row.differences.get(metric)
            paired = [difference.mean, difference.half_width] if difference else ["", ""]
            cells = [one.mean, one.half_width, *paired]
            shown = ["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells]
            writer.writerow([row.name, metric, one.count, *shown])
    return text.getvalue()


def published_rows(text: str) -> list[dict[str, str]]:
    """The rows of a CSV of published accuracies: `row` is a name, `peer0` .., `peers` and so on are in per cent.

    Raises:
        UserError: a column is unknown, or a value is not a number.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    for row in rows:
        for column, value in row.items():
            if column == "row":
                continue
            if not re.fullmatch(r"peer\d+|peers|ensemble_average|method", str(column)):
                raise UserError(
                    f"published figures: unknown column '{column}'; allowed: row, peer0, peer1 .., peers, "
                    "ensemble_average, method"
                )
            if value and not re.fullmatch(r"\d+(\.\d+)?", str(value)):
                raise UserError(
                    f"published figures: {column} of {row.get('row')} is '{value}'; give per cent, or nothing"
                )
    return rows


def _accuracies(rows: Sequence[Row], split: str, published: str = "") -> TextTable:
    columns = quantities(rows)
    estimates = {name: [row.accuracies.get(f"{split}/accuracy/{name}") for row in rows] for name in columns}
    best = set()
    for column, found in enumerate(estimates.values(), start=1):
        present = {index: one for index, one in enumerate(found) if one is not None}
        place = clear_best(list(present.values()))
        if place is not None:
            best.add((list(present)[place], column))
    body = [[row.name, *(text_of(found[index]) for found in estimates.values())] for index, row in enumerate(rows)]
    for row in published_rows(published):
        body.append([f"{row['row']} (published)", *(row.get(name) or "" for name in columns)])
    counts = sorted({len(row.seeds) for row in rows})
    runs = number_of(counts[0], "seed") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    title = f"{SPLIT_WORDS[split]} accuracy (%): mean ± 95 % interval over {runs}"
    return TextTable(title, ["method", *columns.values()], body, frozenset(best))


def _differences(rows: Sequence[Row], split: str) -> TextTable:
    columns = quantities(rows)
    body = [
        [row.name, *(text_of(row.differences.get(f"{split}/accuracy/{name}"), "+z.2f") for name in columns)]
        for row in rows[1:]
    ]
    title = f"{SPLIT_WORDS[split]} accuracy minus that of {rows[0].name} (points), paired by seed"
    return TextTable(title, ["method", *columns.values()], body)


def _costs(rows: Sequence[Row]) -> TextTable:
    reference = COST_REFERENCE if any(row.name == COST_REFERENCE for row in rows) else rows[0].name
    seconds, memory = COSTS
    body = [
        [
            row.name,
            str(len(row.seeds)),
            text_of(row.costs.get(seconds), ".1f", 1.0),
            _times(row.relative_costs.get(seconds)),
            text_of(row.costs.get(memory), ".0f", 2.0**-20),
            _times(row.relative_costs.get(memory)),
        ]
        for row in rows
        if row.costs
    ]
    headings = ["method", "seeds", "training\nseconds", "relative", "peak memory\nMiB", "relative"]
    return TextTable(f"Cost of training, relative to {reference}", headings, body)


def _times(ratio: float | None) -> str:
    return "" if ratio is None or math.isnan(ratio) else f"{ratio:.2f}×"
