"""A study in its driver: its trials, their states and their configs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.search.comparison import VARIANT
from wml_ray.search.optuna_study import TrialRecord
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space
from wml_ray.search.trials import Trial, TrialStore
from wml_ray.storage.lease import Lease
from wml_ray.storage.paths import to_path
from wml_ray.storage.runs import absolute_run
from wml_ray.tracking.tags import TrialState
from wml_ray.training.events import now_ms

if TYPE_CHECKING:
    from wml_ray.search.publisher import Publisher

DIED = "its process died (killed, out of memory, or its node was lost)"


class RunningStudy:
    """The trials of a study. The trial files are the source of truth; a trial recorded as ended is never rerun."""

    def __init__(
        self,
        space: Space,
        search: SearchConfig,
        folder: Path,
        token: str,
        on_change: Callable[[RunningStudy], None] | None = None,
        lease: Lease | None = None,
    ) -> None:
        """`token` identifies the study in MLflow and Optuna; `lease` is the process's lease on the study's folder."""
        self.space, self.search, self.folder, self.token = space, search, folder, token
        self.store, self.lease = TrialStore(folder, lease), lease
        self.trials = {trial.number: trial for trial in self.store.trials()}
        self.interrupted = [trial for trial in self.trials.values() if trial.state == "RUNNING"]
        self.publisher: Publisher | None = None  # called at each change of a trial, before `on_change`
        self._on_change = on_change or (lambda study: None)
        self._next_number = self.store.next_number()
        self._started: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._first_start: tuple[float, int] | None = None  # seconds and epochs at the first start of a trial

    @property
    def remaining(self) -> int:
        """Number of trials to be run, the interrupted ones included."""
        return max(0, self.search.trials - len(self.trials)) + len(self.interrupted)

    @property
    def epochs(self) -> int:
        """Epochs trained by all trials together."""
        return sum(trial.epochs for trial in self.trials.values())

    @property
    def budget(self) -> int:
        """Epochs of a complete trial."""
        return self.space.base.optim.epochs

    def add_trial(self, point: Mapping[str, Any], system_attributes: dict[str, Any]) -> Trial:
        """A new trial at a point that the config accepts."""
        number, self._next_number = self._next_number, self._next_number + 1
        trial = Trial(number, dict(point), created_ms=now_ms(), system_attributes=system_attributes)
        self.store.write(trial)
        self.trials[trial.number] = trial
        return trial

    def on_start(self, trial: Trial) -> None:
        """Record that a trial starts, for the first time or again."""
        self._started.add(trial.number)
        self._first_start = self._first_start or (time.monotonic(), self.epochs)
        if self.publisher:
            self.publisher.on_start(trial)
        self._on_change(self)

    def on_report(self, trial: Trial, report: Mapping[str, Any]) -> None:
        """Record the end of an epoch. Epochs that a restarted trial reports again are ignored."""
        epoch = int(report["epoch"])
        trial.sizes = report["sizes"] or trial.sizes
        if epoch > trial.epochs:
            trial.history.append({key: report[key] for key in ("epoch", "timestamp_ms", "metrics")})
        trial.final = report.get("final") or trial.final
        if self.publisher:
            self.publisher.on_report(trial)
        self._on_change(self)

    def on_end(self, trial: Trial, end: Literal["returned", "stopped", "failed"]) -> None:
        """Record the end of a trial and write its file."""
        trial.state = self._state(trial, end)
        if trial.state == "FAILED":
            trial.reason = trial.reason or DIED
        try:
            self.store.write(trial)
        except UserError:
            trial.state = "RUNNING"
            raise
        self._delete_checkpoints_if_stopped(trial)
        if self.publisher:
            self.publisher.on_end(trial)
        self._on_change(self)

    def record_death(self, trial: Trial) -> bool:
        """Count one more death of a trial's processes; returns whether the trial may start again."""
        self._deaths[trial.number] += 1
        return self._deaths[trial.number] <= self.space.base.scale.max_failures

    def delete_stopped_checkpoints(self) -> None:
        """Delete checkpoints that workers of stopped trials wrote after `on_end`. No trial may run any more."""
        for number in self._started:
            self._delete_checkpoints_if_stopped(self.trials[number])

    def config(self, trial: Trial) -> Config:
        """The config of a trial for `wml-ray train`; its `run.study` names the trial."""
        return with_values(self.space.base, {**self.space.values(trial.point), "run.study": self.label(trial)})

    def local_config(self, trial: Trial) -> Config:
        """The config of a trial as it runs: in the study's folder, with absolute paths."""
        config = self.config(trial)
        values = {
            "run.storage_path": str((self.folder / "trials").resolve()),
            "run.name": self.store.trial_folder(trial.number).name,
            "data.root": str(to_path(config.data.root).resolve()),
            "scale.cpus_per_worker": config.scale.cpus_per_worker or 1,  # as in `trial_resources`
        }
        if config.teacher.run and config.method.name in TEACHER_METHODS:
            values["teacher.run"] = absolute_run(config.teacher.run, config.run.storage_path)
        return with_values(config, values)

    def label(self, trial: Trial) -> str:
        """Name of a trial among those of all studies."""
        return f"{self.search.study}/{trial.number}"

    def title(self, trial: Trial) -> str:
        """Name of a trial for people: its variant and seed in a comparison, else its number."""
        if VARIANT in trial.point:
            return f"{trial.point[VARIANT]} seed={trial.point['seed']}"
        return f"trial {trial.number}"

    def record(self, trial: Trial) -> TrialRecord:
        """A trial as Optuna stores it."""
        metrics = list(self.space.objectives)
        values = self.values(trial) if trial.state == "COMPLETE" else None
        intermediate = {}
        if len(metrics) == 1:
            found = {entry["epoch"]: entry["metrics"].get(metrics[0]) for entry in trial.history}
            intermediate = {epoch: value for epoch, value in found.items() if value is not None}
        return TrialRecord(self.label(trial), trial.point, trial.state, values, intermediate, trial.system_attributes)

    def values(self, trial: Trial) -> list[float]:
        """The objectives of a complete trial."""
        results = trial.results()
        return [results[metric] for metric in self.space.objectives]

    def counts(self) -> Counter[TrialState]:
        """Number of trials by state."""
        return Counter(trial.state for trial in self.trials.values())

    def running(self) -> list[Trial]:
        """Trials that train now; other RUNNING trials wait for a slot in the cluster."""
        return [trial for trial in self.trials.values() if trial.state == "RUNNING" and trial.number in self._started]

    def complete(self) -> list[Trial]:
        """Trials that reached the full budget, by number."""
        return [trial for trial in self.trials.values() if trial.state == "COMPLETE"]

    def best(self) -> Trial | None:
        """The complete trial with the best first objective. The later objectives, then the number, break ties."""
        signs = [1 if mode == "min" else -1 for mode in self.space.objectives.values()]

        def rank(trial: Trial) -> list[float]:
            return [*(sign * value for sign, value in zip(signs, self.values(trial), strict=True)), trial.number]

        return min(self.complete(), key=rank, default=None)

    def best_values(self) -> dict[str, float]:
        """Objective -> its best value among all complete trials; empty without one."""
        results = [trial.results() for trial in self.complete()]
        modes = self.space.objectives.items() if results else ()
        return {metric: (min if mode == "min" else max)(row[metric] for row in results) for metric, mode in modes}

    def eta_s(self) -> float | None:
        """Seconds left if coming trials are as long as the ended ones were; None before the first trial has ended."""
        ended = [trial.epochs for trial in self.trials.values() if trial.state != "RUNNING"]
        start_s, start_epochs = self._first_start or (0.0, self.epochs)
        trained = self.epochs - start_epochs
        if not ended or not trained:
            return None
        mean = sum(ended) / len(ended)
        running = [trial.epochs for trial in self.trials.values() if trial.state == "RUNNING"]
        # a trial that is longer than the mean is expected to reach the full budget
        left = sum((mean if epochs < mean else self.budget) - epochs for epochs in running)
        left += (self.search.trials - len(self.trials)) * mean
        return max(left, 0.0) * (time.monotonic() - start_s) / trained

    def _state(self, trial: Trial, end: str) -> TrialState:
        if end == "failed" or (end == "returned" and trial.final is None):
            return "FAILED"
        if trial.final is None:
            return "STOPPED"
        if not all(math.isfinite(value) for value in self.values(trial)):
            trial.reason = "an objective is not a finite number"
            return "FAILED"
        return "COMPLETE"

    def _delete_checkpoints_if_stopped(self, trial: Trial) -> None:
        if trial.state == "STOPPED" and not self.search.keep_stopped:
            self.store.delete_checkpoints(trial.number)
