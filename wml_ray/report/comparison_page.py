"""The report of a comparison: its picture, its tables as CSV and LaTeX, and one self-contained HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.methods.settings import unused_sections
from wml_ray.report.comparison import Estimate, Row, compared_rows
from wml_ray.report.comparison_tables import (
    BEST_NOTE,
    TextTable,
    aligned,
    comparison_tables,
    latex,
    markdown,
    tidy_csv,
)
from wml_ray.report.page import html_page, html_picture, html_settings
from wml_ray.report.study_tables import trials_summary
from wml_ray.report.style import count_labels, legend_below, log_ticks, new_axes, save_figures
from wml_ray.tracking.results import StudyRecords

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CAPTION = (
    "Each point is a peer, the mean over the seeds with its 95 % interval; a diamond is the method's own prediction at "
    "the MACs of the whole tree. Rows are shifted by a percent of their MACs, so that their intervals do not overlap."
)


@dataclass(frozen=True)
class ComparisonReport:
    """The rows of a comparison and all its tables."""

    title: str
    summary: str
    settings: Mapping[str, str]
    runs: pd.DataFrame
    rows: list[Row]
    tables: list[TextTable]

    def text(self) -> str:
        """Summary and tables as aligned plain text."""
        note = [f" {BEST_NOTE}"] if any(table.best for table in self.tables) else []
        return "\n\n".join([self.summary, *map(aligned, self.tables), *note])

    def note(self) -> str:
        """Summary and tables as Markdown."""
        return "\n\n".join([self.summary, *map(markdown, self.tables)])

    def write(self, folder: Path) -> list[Path]:
        """Write the picture, CSV, LaTeX and `report.html`; returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        pictures = save_figures({"accuracy_macs": _accuracy_against_macs(self.rows)}, folder) if self.rows else []
        texts = {
            "comparison.csv": tidy_csv(self.rows),
            "runs.csv": self.runs.drop(columns="peers").to_csv(index=False),
            "comparison.tex": "\n\n".join(map(latex, self.tables)) + "\n",
            "report.html": self._page(pictures),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [*pictures, *(folder / name for name in texts)]

    def _page(self, pictures: Sequence[Path]) -> str:
        first, *others = map(_html_table, self.tables) if self.tables else [""]
        parts = [
            f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.summary)}</p>",
            html_settings(self.settings),
            first,
            *(html_picture(path, CAPTION) for path in pictures),
            *others,
            '<p class="note">Bold: the best of a column where its interval lies above those of all other rows. '
            "Settings were chosen on validation images only; test accuracy was measured once, after training.</p>",
        ]
        return html_page(self.title, parts)


def study_report(study: StudyRecords) -> ComparisonReport:
    """The report of a comparison that `wml-ray compare` made."""
    complete = study.trials[study.trials["state"] == "COMPLETE"]
    rows = compared_rows(complete, study.variants)
    tables = comparison_tables(rows, _settings_of(complete, study), study.published)
    failed = study.trials[study.trials["state"] == "FAILED"]
    reasons = [f"{trial['variant']} seed={trial['seed']} failed: {trial['reason']}" for _, trial in failed.iterrows()]
    summary = "\n".join([trials_summary(study), *reasons])
    return ComparisonReport(study.name, summary, study.settings, complete, rows, tables)


def runs_report(experiment: str, runs: pd.DataFrame, names: Sequence[str]) -> ComparisonReport:
    """The report of finished runs with `variant` and `seed`, see `comparison.group_runs`."""
    rows = compared_rows(runs, names)
    summary = f"{len(runs)} finished runs of {experiment} in {len(rows)} groups"
    return ComparisonReport(experiment, summary, {}, runs, rows, comparison_tables(rows, {}))


def _settings_of(complete: pd.DataFrame, study: StudyRecords) -> dict[str, str]:
    """The settings of each row, of the keys in which the rows differ, besides method and seed."""
    keys = [key for key in study.searched if key not in ("method.name", "seed")]
    settings = {}
    for name in study.variants:
        for _, run in complete[complete["variant"] == name].head(1).iterrows():
            unused = unused_sections(run["method.name"])
            values = {key: run[key] for key in keys if key.partition(".")[0] not in unused}
            words = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in values.items()}
            settings[name] = " ".join(f"{key}={word}" for key, word in words.items())
    return settings


def _html_table(table: TextTable) -> str:
    def line(tag: str, cells: Sequence[str], best: set[int]) -> str:
        texts = [html.escape(cell) for cell in cells]
        texts = [f"<b>{text}</b>" if column in best else text for column, text in enumerate(texts)]
        left = {0, 1} if table.headings[1:] == ["settings"] else {0}
        classes = [' class="text"' if column in left else "" for column in range(len(texts))]
        return "".join(f"<{tag}{name}>{text}</{tag}>" for name, text in zip(classes, texts, strict=True))

    body = "\n".join(
        f"<tr>{line('td', cells, {column for row, column in table.best if row == index})}</tr>"
        for index, cells in enumerate(table.rows)
    )
    head = line("th", table.headings, set())
    title = f"<h2>{html.escape(table.title)}</h2>"
    return f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _accuracy_against_macs(rows: Sequence[Row]) -> Figure:
    figure, axes = new_axes("Test accuracy against size", "MACs an image", "test accuracy (%)")
    for index, row in enumerate(rows):
        shift = 1.01 ** (index - (len(rows) - 1) / 2)
        peers = sorted((macs, row.accuracies[f"test/accuracy/peer{peer}"]) for peer, macs in enumerate(row.macs))
        own = row.accuracies["test/accuracy/method"]
        means = [100 * peer.mean for _, peer in peers]
        halves = [_half(peer) for _, peer in peers]
        colour = f"C{index % 10}"
        places = [shift * macs for macs, _ in peers]
        axes.errorbar(places, means, halves, color=colour, marker="o", capsize=3, label=row.name)
        if not math.isnan(row.tree_macs):
            style: dict[str, Any] = {"color": colour, "marker": "D", "capsize": 3, "markerfacecolor": "none"}
            axes.errorbar([shift * row.tree_macs], [100 * own.mean], [_half(own)], **style)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 101))  # the intervals of two seeds may be wider than the axis
    axes.set_xscale("log")
    log_ticks(axes.xaxis)
    count_labels(axes.xaxis)
    legend_below(figure, [axes])
    return figure


def _half(estimate: Estimate) -> float:
    return 0.0 if math.isnan(estimate.half_width) else 100 * estimate.half_width
