"""The columns of a study's tables and plots, its summary line and the table of its Pareto front."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from wml_ray.errors import number_of
from wml_ray.report.analysis import pareto_front
from wml_ray.report.style import count_labels, log_ticks, new_table, percent, prediction_words, short_count
from wml_ray.tracking.results import StudyRecords

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axis import Axis


CELL_WIDTH = 24
STATES = {"COMPLETE": "complete", "STOPPED": "stopped early", "FAILED": "failed", "RUNNING": "running"}
LETTERS = {
    "wml.alpha": "alpha",
    "wml.mirror_step_size": "eta",
    "wml.update_every": "T",
    "wml.unroll_learning_rate": "gamma",
    "wml.temperature": "tau",
}
"""The letters of the README."""
MEMBERS = {"tree": "peer tree", "method": "method's prediction"}
SPLITS = {"val": "validation", "test": "test"}


@dataclass(frozen=True)
class Column:
    """A column of the trials, and how tables and axes show it."""

    name: str
    heading: str
    title: str
    kind: str = "number"  # percent | count | number | choice
    log: bool = False
    choices: tuple[str, ...] = ()

    def values(self, trials: pd.DataFrame) -> pd.Series[float]:
        """Positions of the trials on an axis. Equal choices are spread a little, so that all are visible."""
        import pandas as pd

        if self.kind == "choice":
            positions = trials[self.name].map(lambda value: float(self.choices.index(str(value))))
            return positions.astype(float) + ((trials["trial"] * 0.618 + 0.5) % 1 - 0.5) * 0.3
        values = pd.to_numeric(trials[self.name], errors="coerce").astype(float)
        values = values.where(values > 0) if self.log else values
        return values * 100 if self.kind == "percent" else values

    def cell(self, value: Any) -> str:
        """A value as text; empty if there is none."""
        if self.kind == "choice" or isinstance(value, str):
            return str(value)
        if value is None or math.isnan(value):
            return ""
        formats: dict[str, Callable[[float], str]] = {"percent": percent, "count": short_count}
        return formats.get(self.kind, "{:.3g}".format if isinstance(value, float) else str)(value)

    def dress(self, axis: Axis) -> None:
        """Set the ticks of an axis of this column."""
        from matplotlib.ticker import MaxNLocator

        if self.kind == "count":
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            count_labels(axis)
        if self.kind == "choice":
            labels = [_short(choice, 18).replace("$", r"\$") for choice in self.choices]
            axis.set_ticks(range(len(labels)), labels, fontsize="small")
            if sum(map(len, labels)) > 36:
                for label in axis.get_ticklabels():
                    label.set(rotation=25, ha="right", rotation_mode="anchor")
            axis.axes.set_xlim(-0.5, max(len(labels), 1) - 0.5)
        if self.log:
            axis.axes.set_xscale("log")
            log_ticks(axis)
            axis.set_major_formatter("{x:g}")
        elif self.kind == "number":
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=self == TRIAL, min_n_ticks=1))
        low, high = axis.get_view_interval()
        if self.kind == "percent" and high > 100:
            limit = axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim
            limit(low, 100 + 0.03 * (100 - low))


def trials_summary(study: StudyRecords) -> str:
    """One line with the number of trials in each state and the epochs trained."""
    states = study.trials["state"].value_counts()
    ends = ", ".join(f"{states[state]} {words}" for state, words in STATES.items() if state in states)
    total, epochs = len(study.trials), int(study.trials["epochs"].sum())
    return f"{number_of(total, 'trial')}: {ends or 'none yet'}; {number_of(epochs, 'epoch')}"


def front_table(study: StudyRecords, width: int = 120) -> Table:
    """The Pareto front, the best first objective first. Keys that do not fit into `width` characters are left out."""
    chosen = study.trials.set_index("trial", drop=False).loc[pareto_front(study)]
    shown, left_out = _fitting(study, chosen, width)
    table = new_table(*_bottom_aligned(shown))
    for _, trial in chosen.iterrows():
        table.add_row(*(escape(_short(column.cell(trial[column.name]), CELL_WIDTH)) for column in shown))
    if chosen.empty:
        table.caption = "no trial has reached the full budget yet"
    elif left_out:
        table.caption = f"{number_of(left_out, 'more key')} in trials.csv"
    return table


def front_markdown(study: StudyRecords) -> str:
    """The summary line and the Pareto front with all searched keys, as Markdown."""
    chosen = study.trials.set_index("trial", drop=False).loc[pareto_front(study)]
    objectives, keys = columns_of(study)
    columns = [TRIAL, *objectives, *keys, EPOCHS]
    rows = [[column.cell(trial[column.name]) for column in columns] for _, trial in chosen.iterrows()]
    lines = [[" ".join(column.heading.split()) for column in columns], ["---:"] * len(columns), *rows]
    table = [f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines]
    return "\n".join([trials_summary(study), "", *table])


def metric_of(name: str) -> Column:
    """The column of a metric by its MLflow name."""
    section, _, rest = name.partition("/")
    unit, _, member = rest.partition("/")
    member = MEMBERS.get(member) or prediction_words(member)
    if unit == "accuracy":
        title = f"{SPLITS.get(section, section)} accuracy (%)\n{member}"
        return Column(name, f"{textwrap.fill(member, 9)}\n{section} %", title, "percent")
    if section == "peers":
        word = {"macs": "MACs", "params": "params"}.get(unit, unit)
        return Column(name, f"{word}\n{member}", f"{word}{' an image' * (unit == 'macs')}, {member}", "count")
    return Column(name, name.replace("/", "\n"), name)


def key_of(study: StudyRecords, key: str) -> Column:
    """The column of a searched key."""
    scale = study.searched[key]
    heading = _heading(key)
    if sum(_heading(other) == heading for other in study.searched) > 1:
        heading = key.replace(".", "\n")
    title = f"{LETTERS[key]} ({key})" if key in LETTERS else key
    if scale != "choice":
        return Column(key, heading, title, log=scale == "log")
    choices = tuple(dict.fromkeys(str(value) for value in sorted(study.trials[key], key=_choice_order)))
    return Column(key, heading, title, "choice", choices=choices)


def _heading(key: str) -> str:
    words = re.sub(r"[._]", " ", key.partition(".")[2] or key)
    return LETTERS.get(key, textwrap.fill(words, 9))


def _choice_order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else 0.0, str(value))


TRIAL = Column("trial", "trial", "trial")
EPOCHS = Column("epochs", "epochs", "epochs")
STATE = Column("state", "state", "state")
REASON = Column("reason", "reason", "reason")


def columns_of(study: StudyRecords) -> tuple[list[Column], list[Column]]:
    """The columns of the objectives and of the searched keys."""
    return [metric_of(name) for name in study.objectives], [key_of(study, key) for key in study.searched]


def _fitting(study: StudyRecords, trials: pd.DataFrame, width: int) -> tuple[list[Column], int]:
    """The columns that fit into `width` characters, and the number of keys that do not."""
    objectives, keys = columns_of(study)

    def width_of(shown: Sequence[Column]) -> int:
        texts = ([*c.heading.split("\n"), *(_short(c.cell(v), CELL_WIDTH) for v in trials[c.name])] for c in shown)
        return sum(max(map(len, lines)) + 1 for lines in texts) + 1

    kept = list(keys)
    while kept and width_of([TRIAL, *objectives, *kept, EPOCHS]) > width:
        kept.pop()
    return [TRIAL, *objectives, *kept, EPOCHS], len(keys) - len(kept)


def _bottom_aligned(shown: Sequence[Column]) -> list[str]:
    lines = max(column.heading.count("\n") for column in shown)
    return ["\n" * (lines - column.heading.count("\n")) + column.heading for column in shown]


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"
