"""Progress for people: one live display on a terminal, plain lines now and then where there is none."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from wml_ray.config.schema import Config
from wml_ray.search.study import Study
from wml_ray.search.trials import Trial
from wml_ray.training.events import EpochEnd, StepProgress

PLAIN_LINE_S = 10.0  # between two progress lines where there is no terminal


class TrainingProgress:
    """One live line with an ETA; without a terminal, a plain line now and then."""

    def __init__(self, config: Config) -> None:
        self.run_id, self.epochs = config.run_id, config.optim.epochs
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("ETA"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task("starting", total=None)
        self.plain = not console.is_terminal
        self.accuracy = ""
        self.first: tuple[float, int] | None = None
        self.last_line_s = 0.0

    def __enter__(self) -> TrainingProgress:
        if not self.plain:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.plain:
            self.bar.stop()

    def __call__(self, event: StepProgress | EpochEnd) -> None:
        if isinstance(event, EpochEnd):
            self.accuracy = f", accuracy {event.metrics['val/accuracy/method'] * 100:.1f} %"
            return
        text = f"epoch {event.epoch}/{self.epochs}, loss {event.loss:.3f}{self.accuracy}"
        now_s = time.monotonic()
        if self.first is None:  # the ETA counts from here: a resumed run has not done its first steps just now
            self.first = (now_s, event.step)
            self.bar.reset(self.task, description=text, completed=event.step, total=event.total_steps)
            self._line(now_s, text)
        self.bar.update(self.task, description=text, completed=event.step)
        if now_s - self.last_line_s >= PLAIN_LINE_S:
            first_s, first_step = self.first
            left_s = (now_s - first_s) / max(event.step - first_step, 1) * (event.total_steps - event.step)
            self._line(now_s, f"{text}, ETA {_clock(left_s)}")

    def _line(self, now_s: float, text: str) -> None:
        self.last_line_s = now_s
        if self.plain:
            print(f"{self.run_id} {text}", flush=True)


class StudyProgress:
    """One live table of a study: how many trials are done, the best so far, the time left, and what is running."""

    def __init__(self) -> None:
        self.console = Console()
        self.live = Live(console=self.console, transient=True, refresh_per_second=4)
        self.plain = not self.console.is_terminal
        self.done: set[int] = set()  # trials that were spoken of
        self.last_line_s = 0.0

    def __enter__(self) -> StudyProgress:
        if not self.plain:
            self.live.start()
            self.live.update(Text("starting Ray"))
        return self

    def __exit__(self, *_: object) -> None:
        if not self.plain:
            self.live.stop()

    def __call__(self, sweep: Study) -> None:
        if not self.plain:
            self.live.update(Group(Text(summary(sweep)), _running(sweep)))
            return
        ended = [trial for trial in sweep.trials.values() if trial.state != "RUNNING" and trial.number not in self.done]
        if ended or time.monotonic() - self.last_line_s >= PLAIN_LINE_S:
            self.done |= {trial.number for trial in ended}
            self.last_line_s = time.monotonic()
            for trial in ended:
                print(ending(sweep, trial))
            print(f"{sweep.search.study}: {summary(sweep)}", flush=True)


def ending(sweep: Study, trial: Trial) -> str:
    """What became of a trial, in a line."""
    name = f"{sweep.search.study}: trial {trial.number} ({sweep.config(trial).run_id})"
    return f"{name} {trial.state} after {trial.epochs} epochs{f': {trial.reason}' if trial.reason else ''}"


def summary(sweep: Study) -> str:
    """Where a study stands, in a line."""
    counts, best, left_s = sweep.counts(), sweep.best(), sweep.eta_s()
    done, running = counts.total() - counts["RUNNING"], len(sweep.running())
    states = {"complete": counts["COMPLETE"], "stopped early": counts["STOPPED"], "failed": counts["FAILED"]}
    words = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    line = f"{done} of {sweep.search.trials} trials done{f' ({words})' if words else ''}, {running} running"
    if waiting := counts["RUNNING"] - running:
        line += f", {waiting} waiting for a place"
    if best is not None:
        metric = next(iter(sweep.space.objectives))
        line += f", best {_value(metric, sweep.values(best)[0])} (trial {best.number})"
    return line + (f", {_clock(left_s)} left" if left_s is not None else "")


def _running(sweep: Study) -> Table:
    metric, searched = sweep.search.stop_metric, sweep.space.searched
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("trial", "epoch", metric, *searched):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in sweep.running()[-20:]:
        metrics, flat = trial.metrics(), sweep.config(trial).flatten()
        reached = _value(metric, metrics[metric]) if metric in metrics else ""
        values = [_short(flat.get(key, "")) for key in searched]
        table.add_row(str(trial.number), f"{trial.epochs}/{sweep.budget}", reached, *values)
    return table


def _value(metric: str, value: float) -> str:
    return f"{value * 100:.2f} %" if "/accuracy/" in metric else f"{value:.4g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
