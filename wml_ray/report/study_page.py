"""The report of a study: plots, trials as CSV, and one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.report.analysis import IMPORTANCE_TRIALS, comparable_trials, importances, pareto_front
from wml_ray.report.page import html_page, html_picture, html_settings
from wml_ray.report.study_plots import best_trials, draw
from wml_ray.report.study_tables import EPOCHS, REASON, STATE, STATES, TRIAL, Column, columns_of, trials_summary
from wml_ray.report.style import save_figures
from wml_ray.tracking.results import StudyRecords

if TYPE_CHECKING:
    import pandas as pd


def write_study(study: StudyRecords, folder: Path) -> list[Path]:
    """Write the plots, `trials.csv` and the self-contained `report.html`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = importances(study)
    pictures = save_figures(draw(study, shares), folder)
    csv, page = folder / "trials.csv", folder / "report.html"
    csv.write_text(study.trials.drop(columns="peers").to_csv(index=False), encoding="utf-8")
    page.write_text(_page(study, {path.stem: path for path in pictures}, shares), encoding="utf-8")
    return [csv, *pictures, page]


CAPTIONS = {
    "pareto": "Trials that trained for the full budget of epochs. Trials that were stopped early are shown at their "
    "last value and are never on the front.",
    "parameters": "Each searched key against the objective.",
    "importance": "The share of the variance of an objective that each key explains by itself (fANOVA over the trials "
    "of the full budget), in per cent of the variance that all keys explain.",
    "history": "The trials in the order in which they started, and the best value so far.",
    "peers": "All peers of the best trials; each peer is a separate network.",
}


def _page(study: StudyRecords, pictures: dict[str, Path], shares: dict[str, dict[str, float]]) -> str:
    objectives, keys = columns_of(study)
    trials = study.trials.assign(state=study.trials["state"].map(STATES))
    chosen = trials.set_index("trial", drop=False).loc[pareto_front(study)]
    nothing = "" if len(chosen) else "<p>No trial has reached the full budget of epochs yet.</p>"
    parts = [
        f"<h1>{html.escape(study.name)}</h1><p>{html.escape(trials_summary(study))}</p>",
        _settings(study),
        f"<h2>{'Pareto front' if len(objectives) > 1 else 'Best trial'}</h2>{nothing}",
        "" if nothing else _html_table([TRIAL, *objectives, *keys, EPOCHS], chosen),
        _image(pictures, "pareto"),
        "<h2>Effect of the searched keys</h2>",
        _image(pictures, "parameters"),
        _image(pictures, "importance"),
        _missing_importance(study, shares),
        "<h2>History of the search</h2>",
        _image(pictures, "history"),
        "<h2>Peers of the best trials</h2>" + (nothing or _image(pictures, "peers") + _peer_tables(study)),
        "<section><h2>All trials</h2>",
        _html_table([TRIAL, STATE, *objectives, *keys, EPOCHS, REASON], trials, pareto_front(study)),
        "</section>",
    ]
    return html_page(study.name, parts)


def _settings(study: StudyRecords) -> str:
    goals = [f"{'highest' if way == 'max' else 'lowest'} {name}" for name, way in study.objectives.items()]
    return html_settings({"objectives": ", ".join(goals), "searched": ", ".join(study.searched), **study.settings})


def _image(pictures: dict[str, Path], name: str) -> str:
    if name not in pictures:
        return ""
    return html_picture(pictures[name], CAPTIONS[name])


def _missing_importance(study: StudyRecords, shares: dict[str, dict[str, float]]) -> str:
    compared = len(comparable_trials(study))
    missing = [objective for objective, found in shares.items() if not found]
    if not missing or not study.searched:
        return ""
    return (
        f'<p class="note">No importance for {html.escape(", ".join(missing))}: at least {IMPORTANCE_TRIALS} '
        "trials of the full budget are needed, and the objective and a searched key must vary among them; "
        f"{compared} {'has' if compared == 1 else 'have'} trained for the full budget.</p>"
    )


def _peer_tables(study: StudyRecords) -> str:
    import pandas as pd

    columns = [
        Column("peer", "peer", ""),
        *(Column(unit, heading, "", "count") for unit, heading in (("params", "params"), ("macs", "MACs"))),
        *(Column(split, f"{split} %", "", "percent") for split in ("val", "test")),
        Column("weight", "weight", ""),
    ]
    tables = (
        f"<div><h3>Trial {number}</h3>{_html_table(_present(columns, peers), pd.DataFrame(peers))}</div>"
        for number, peers in best_trials(study)
    )
    note = (
        '<p class="note">The search used validation accuracy only; test accuracy was measured once, after training.</p>'
    )
    return f'<div class="side">{"".join(tables)}</div>{note}'


def _present(columns: Sequence[Column], peers: Sequence[dict[str, Any]]) -> list[Column]:
    """The columns that the peers have: those of a method without weights have no weight."""
    return [column for column in columns if column.name in peers[0]]


def _html_table(columns: Sequence[Column], rows: pd.DataFrame, marked: Iterable[int] = ()) -> str:
    marked = set(marked)
    texts = {column.name: ' class="text"' for column in columns if column in (STATE, REASON)}

    def line(tag: str, cells: Iterable[str]) -> str:
        filled = zip(columns, cells, strict=True)
        return "".join(f"<{tag}{texts.get(column.name, '')}>{html.escape(cell)}</{tag}>" for column, cell in filled)

    def row_class(row: Any) -> str:
        if row.get("trial") in marked:
            return ' class="front"'
        return ' class="faint"' if row.get("state", "complete") != "complete" else ""

    body = "\n".join(
        f"<tr{row_class(row)}>{line('td', (column.cell(row[column.name]) for column in columns))}</tr>"
        for _, row in rows.iterrows()
    )
    head = line("th", (column.heading for column in columns))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
