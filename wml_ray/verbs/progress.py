"""Progress for people: one live display on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from wml_ray.config.schema import Config
from wml_ray.errors import number_of
from wml_ray.training.events import EpochEnd, StepProgress

if TYPE_CHECKING:  # the progress of a training starts before PyTorch is imported
    from wml_ray.search.study import RunningStudy
    from wml_ray.search.trials import Trial

NOTEBOOK_S = 0.25  # between two updates of a notebook
PLAIN_LINE_S = 10.0  # between two lines of a study where there is no terminal
MAX_SHARE = 0.1  # of the driver's time that goes into showing a study, which takes longer the more trials it has


def run_line(config: Config) -> str:
    """The first line of a run."""
    from wml_ray.training.precision import describe_precision
    from wml_ray.training.threads import describe_threads

    peers = f"{config.num_peers} peers of {config.model.backbone}"
    how = f"{describe_threads(config)}, {describe_precision(config)}"
    return f"run {config.run_id}: {peers} on {config.data.name}, {how}"


@contextmanager
def image_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of images on a terminal while the body runs; the body calls it with those done and all."""
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TextColumn("ETA"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Notebook:
    """A display in a Jupyter notebook that is updated in place. That of rich needs ipywidgets, this one does not."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_s = 0.0

    def show(self, content: RenderableType, at_once: bool = False) -> None:
        """Show the content; soon after another it is left out, unless it must be shown at once."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(Padding(content, 0), display_id=True)
        elif at_once or time.monotonic() - self._shown_s >= NOTEBOOK_S:
            self._handle.update(Padding(content, 0))
            self._shown_s = time.monotonic()


class TrainingProgress:
    """Shows the progress of a training: a live line with an ETA on a terminal or in a notebook, else one an epoch."""

    def __init__(self, config: Config) -> None:
        self._config = config
        console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("ETA"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("starting", total=None)
        self._notebook = _Notebook() if console.is_jupyter else None
        self._plain = not console.is_terminal and not console.is_jupyter
        self._accuracy = ""
        self._first: tuple[float, StepProgress] | None = None  # seconds and event of the first report
        self._eta = ""

    def __enter__(self) -> TrainingProgress:
        print(run_line(self._config), flush=True)
        if self._notebook:
            self._notebook.show(self._bar)
        elif not self._plain:
            self._bar.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._notebook:
            if error is None:
                self._bar.update(self._task, description=f"finished{self._accuracy}", total=1, completed=1)
            self._notebook.show(self._bar, at_once=True)
        elif not self._plain:
            self._bar.stop()

    def __call__(self, event: StepProgress | EpochEnd) -> None:
        if isinstance(event, EpochEnd):
            self._accuracy = f", accuracy {event.metrics['val/accuracy/method'] * 100:.1f} %"
            if self._plain:
                text = self._text(event.epoch, event.metrics["train/loss"])
                print(f"{self._config.run_id} {text}{self._eta}", flush=True)
            return
        text = self._text(event.epoch, event.loss)
        if self._first is None:  # the ETA is measured from here: a resumed run did the steps before earlier
            self._first = (time.monotonic(), event)
            self._bar.reset(self._task, description=text, completed=event.step, total=event.total_steps)
        first_s, first = self._first
        elapsed_s, steps = time.monotonic() - first_s, event.step - first.step
        if steps:
            self._eta = f", ETA {_clock(elapsed_s / steps * (event.total_steps - event.step))}"
        self._bar.update(self._task, description=text, completed=event.step)
        if self._notebook:
            self._notebook.show(self._bar)

    def _text(self, epoch: int, loss: float) -> str:
        return f"epoch {epoch}/{self._config.optim.epochs}, loss {loss:.3f}{self._accuracy}"


class StudyProgress:
    """Shows the progress of a study: a live table of its running trials, else lines for ended trials and the study."""

    def __init__(self) -> None:
        console = Console()
        self._live = Live(console=console, transient=True, refresh_per_second=4)
        self._notebook = _Notebook() if console.is_jupyter else None
        self._plain = not console.is_terminal and not console.is_jupyter
        self._content: RenderableType = Text("starting Ray")
        self._shown: set[str] = set()  # ended trials whose line was printed
        self._last_line_s = 0.0
        self._study: RunningStudy | None = None
        self._next_s = 0.0  # time before which changes are not shown

    def __enter__(self) -> StudyProgress:
        if self._notebook:
            self._notebook.show(self._content)
        elif not self._plain:
            self._live.start()
            self._live.update(self._content)
        return self

    def __exit__(self, *_: object) -> None:
        if self._study:  # the last change may not have been shown
            self._show(self._study)
        if self._notebook:
            self._notebook.show(self._content, at_once=True)
        elif not self._plain:
            self._live.stop()

    def __call__(self, study: RunningStudy) -> None:
        """Show the study, or leave that to a later change to stay within `MAX_SHARE`."""
        self._study, start_s = study, time.monotonic()
        if start_s >= self._next_s:
            self._show(study)
            end_s = time.monotonic()
            self._next_s = end_s + min((end_s - start_s) / MAX_SHARE, PLAIN_LINE_S)

    def _show(self, study: RunningStudy) -> None:
        if not self._plain:
            self._content = Group(Text(summary(study)), _running_table(study))
            if self._notebook:
                self._notebook.show(self._content)
            else:
                self._live.update(self._content)
            return
        ended = [trial for trial in study.trials.values() if trial.state != "RUNNING"]
        ended = [trial for trial in ended if study.label(trial) not in self._shown]
        if ended or time.monotonic() - self._last_line_s >= PLAIN_LINE_S:
            self._shown |= {study.label(trial) for trial in ended}
            self._last_line_s = time.monotonic()
            for trial in ended:
                print(end_line(study, trial))
            print(f"{study.search.study}: {summary(study)}", flush=True)


def end_line(study: RunningStudy, trial: Trial) -> str:
    """The state of an ended trial, and the reason if it failed."""
    name = f"{study.search.study}: {study.title(trial)} ({study.config(trial).run_id})"
    return f"{name} {trial.state} after {number_of(trial.epochs, 'epoch')}{f': {trial.reason}' if trial.reason else ''}"


def summary(study: RunningStudy) -> str:
    """Finished and running trials, the best objective and the ETA of a study, in one line."""
    counts, best, eta_s = study.counts(), study.best(), study.eta_s()
    done, running = counts.total() - counts["RUNNING"], len(study.running())
    states = {"complete": counts["COMPLETE"], "stopped early": counts["STOPPED"], "failed": counts["FAILED"]}
    words = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    line = f"{done} of {study.search.trials} trials done{f' ({words})' if words else ''}, {running} running"
    if waiting := counts["RUNNING"] - running:
        line += f", {waiting} waiting for a slot"
    if best is not None:
        metric = next(iter(study.space.objectives))
        line += f", best {_value(metric, study.values(best)[0])} (trial {best.number})"
    return line + (f", ETA {_clock(eta_s)}" if eta_s is not None else "")


def _running_table(study: RunningStudy) -> Table:
    metric, searched = study.search.stop_metric, study.space.searched
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("trial", "epoch", metric, *searched):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in study.running()[-20:]:
        metrics, flat = trial.metrics(), study.config(trial).flatten()
        latest = _value(metric, metrics[metric]) if metric in metrics else ""
        values = [_short(flat.get(key, "")) for key in searched]
        table.add_row(str(trial.number), f"{trial.epochs}/{study.budget}", latest, *values)
    return table


def _value(metric: str, value: float) -> str:
    return f"{value * 100:.2f} %" if "/accuracy/" in metric else f"{value:.4g}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
