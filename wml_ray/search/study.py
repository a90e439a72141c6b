"""A study as its driver keeps it: which trials there are, what becomes of them, and their way into MLflow."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from wml_ray.config.load import with_values
from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.search.optuna_study import TrialRecord
from wml_ray.search.publisher import Publisher
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space
from wml_ray.search.trials import Trial, TrialStore
from wml_ray.storage.lease import Lease
from wml_ray.tracking.runs import TrackedRun
from wml_ray.tracking.tags import TrialState
from wml_ray.training.events import now_ms

DIED = "its process died (killed, out of memory, or its node was lost)"


class Study:
    """The trials of a study. Whatever is not in its ledger has not happened; what is there is never done again."""

    def __init__(
        self,
        space: Space,
        search: SearchConfig,
        folder: Path,
        token: str,
        on_change: Callable[[Study], None] | None = None,
        lease: Lease | None = None,
    ) -> None:
        """`token` is that of the study, which MLflow and Optuna know it by; `lease` is on its folder."""
        self.space, self.search, self.folder, self.token = space, search, folder, token
        self.ledger, self.lease = TrialStore(folder, lease), lease
        self.trials = {trial.number: trial for trial in self.ledger.trials()}
        self.waiting = [trial for trial in self.trials.values() if trial.state == "RUNNING"]
        self.publisher: Publisher | None = None
        self._on_change = on_change or (lambda sweep: None)
        self._started: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._started_s: float | None = None
        self._epochs_before = self.epochs

    @property
    def to_do(self) -> int:
        """Trials still to be run, those interrupted included."""
        return max(0, self.search.trials - len(self.trials)) + len(self.waiting)

    @property
    def epochs(self) -> int:
        """Epochs trained by all trials together."""
        return sum(trial.epochs for trial in self.trials.values())

    @property
    def budget(self) -> int:
        return self.space.base.optim.epochs

    def publish_to(self, parent: TrackedRun) -> None:
        """Tell MLflow of every trial, the finished ones it may have missed included."""
        self.publisher = Publisher(self.search.study, parent, self.token)
        for trial in self.trials.values():
            if trial.state != "RUNNING" and not trial.delivered:
                self._deliver(trial)

    def interrupted(self) -> None:
        """Trials that run are to be taken up later."""
        for trial in self.trials.values():
            if trial.state == "RUNNING" and self.publisher:
                self.publisher.interrupt(trial)

    def close(self, timeout_s: float) -> int:
        """Wait for MLflow; returns how many operations it did not take."""
        return self.publisher.close(timeout_s) if self.publisher else 0

    def tidy(self) -> None:
        """When nothing runs any more: workers of a stopped trial may have written a checkpoint before they ended."""
        for number in self._started:
            self._drop_checkpoints(self.trials[number])

    def begin(self, point: Mapping[str, Any], sampler_notes: dict[str, Any]) -> Trial:
        """A new trial at a point that the config takes."""
        number = max(self.trials, default=-1) + 1
        trial = Trial(number, dict(point), created_ms=now_ms(), sampler_notes=sampler_notes)
        self.ledger.write(trial)
        self.trials[trial.number] = trial
        return trial

    def started(self, trial: Trial) -> None:
        """It is about to run, for the first time or again."""
        self._started.add(trial.number)
        self._started_s = self._started_s or time.monotonic()
        if self.publisher:
            self.publisher.open(trial, self.config(trial))
        self._on_change(self)

    def reported(self, trial: Trial, report: Mapping[str, Any]) -> None:
        """An epoch's end, as the trial's process reports it; one that was interrupted reports its past again."""
        epoch = int(report["epoch"])
        trial.sizes = report["sizes"] or trial.sizes
        if epoch > trial.epochs:
            trial.history.append({key: report[key] for key in ("epoch", "timestamp_ms", "metrics")})
        trial.final = report.get("final") or trial.final
        if self.publisher:
            self.publisher.log(trial)
        self._on_change(self)

    def ended(self, trial: Trial, end: Literal["returned", "stopped", "failed"]) -> None:
        """It will not report again."""
        trial.state = self._state(trial, end)
        if trial.state == "FAILED":
            trial.reason = trial.reason or DIED
        try:
            self.ledger.write(trial)
        except UserError:
            trial.state = "RUNNING"
            raise
        self._drop_checkpoints(trial)
        if self.publisher:
            self._deliver(trial)
        self._on_change(self)

    def may_die_again(self, trial: Trial) -> bool:
        """Count one more death of a trial's processes: whether it may be started again."""
        self._deaths[trial.number] += 1
        return self._deaths[trial.number] <= self.space.base.scale.max_failures

    def config(self, trial: Trial) -> Config:
        """The config of a trial, as `wml-ray train` takes it."""
        return self.space.config(trial.point)

    def placed_config(self, trial: Trial) -> Config:
        """The same, stored in the study's folder and wherever its process runs."""
        config = self.config(trial)
        places = {
            "run.storage_path": str((self.folder / "trials").resolve()),
            "run.name": self.ledger.trial_folder(trial.number).name,
            "data.root": str(Path(config.data.root).resolve()),
            "scale.cpus_per_worker": config.scale.cpus_per_worker or 1,  # what the trials' places were counted with
        }
        return with_values(config, places)

    def label(self, trial: Trial) -> str:
        """The name of a trial among those of all studies."""
        return f"{self.search.study}/{trial.number}"

    def known(self, trial: Trial) -> TrialRecord:
        """A trial as Optuna is to know it."""
        metrics = list(self.space.objectives)
        steps = (
            {} if len(metrics) > 1 else {entry["epoch"]: entry["metrics"].get(metrics[0]) for entry in trial.history}
        )
        steps = {epoch: value for epoch, value in steps.items() if value is not None}
        values = self.values(trial) if trial.state == "COMPLETE" else None
        return TrialRecord(self.label(trial), trial.point, trial.state, values, steps, trial.sampler_notes)

    def values(self, trial: Trial) -> list[float]:
        """What a complete trial came to, an entry an objective."""
        results = trial.results()
        return [results[metric] for metric in self.space.objectives]

    def counts(self) -> Counter[TrialState]:
        return Counter(trial.state for trial in self.trials.values())

    def running(self) -> list[Trial]:
        """Trials that train now; others of that state wait for a place in the cluster."""
        return [trial for trial in self.trials.values() if trial.state == "RUNNING" and trial.number in self._started]

    def best(self) -> Trial | None:
        """The complete trial with the best first objective; on ties the later objectives decide, then the number."""
        signs = [1 if mode == "min" else -1 for mode in self.space.objectives.values()]

        def rank(trial: Trial) -> list[float]:
            return [*(sign * value for sign, value in zip(signs, self.values(trial), strict=True)), trial.number]

        return min((trial for trial in self.trials.values() if trial.state == "COMPLETE"), key=rank, default=None)

    def left_s(self) -> float | None:
        """Seconds left, if trials go on to be as long and to be stopped as often as so far."""
        done = [trial.epochs for trial in self.trials.values() if trial.state != "RUNNING"]
        trained = self.epochs - self._epochs_before
        if not done or not trained or self._started_s is None:
            return None
        running = [trial.epochs for trial in self.trials.values() if trial.state == "RUNNING"]
        a_trial = sum(done) / len(done)
        # a trial that came further than most goes all the way
        left = sum((a_trial if epochs < a_trial else self.budget) - epochs for epochs in running)
        left += (self.search.trials - len(self.trials)) * a_trial
        return max(left, 0.0) * (time.monotonic() - self._started_s) / trained

    def _state(self, trial: Trial, end: str) -> TrialState:
        if end == "failed" or (end == "returned" and trial.final is None):
            return "FAILED"
        if trial.final is None:
            return "STOPPED"
        if not all(math.isfinite(value) for value in self.values(trial)):
            trial.reason = "an objective is not a finite number"
            return "FAILED"
        return "COMPLETE"

    def _drop_checkpoints(self, trial: Trial) -> None:
        if trial.state == "STOPPED" and not self.search.keep_stopped:
            self.ledger.drop_checkpoints(trial.number)

    def _deliver(self, trial: Trial) -> None:
        assert self.publisher is not None
        config = self.config(trial)
        run_folder = self.ledger.trial_folder(trial.number) / config.run_id
        self.publisher.close_trial(trial, config, run_folder, partial(self.ledger.write, trial))
