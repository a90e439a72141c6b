"""The trials of a study as child runs in MLflow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.report.run_report import peer_markdown, write_files
from wml_ray.search.comparison import VARIANT
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import Trial
from wml_ray.storage.files import write_text
from wml_ray.storage.retry import RetryQueue, StorageUnavailable
from wml_ray.storage.runs import RESULT
from wml_ray.tracking.origin import dataset_inputs
from wml_ray.tracking.runs import UNREACHABLE, MetricSender, TrackedRun, finish_run, open_run
from wml_ray.tracking.tags import (
    EPOCHS_TAG,
    NOTE_TAG,
    PARENT_TAG,
    REASON_TAG,
    RUN_ID_TAG,
    STATE_TAG,
    TRIAL_TAG,
    VARIANT_TAG,
    TrialState,
)
from wml_ray.training.result import read_result

_STATUS: dict[TrialState, str] = {"COMPLETE": "FINISHED", "STOPPED": "FINISHED", "FAILED": "FAILED"}


class Publisher:
    """Sends the trials of a study to MLflow, from one thread, in order and exactly once, as children of its run."""

    def __init__(self, study: RunningStudy, parent: TrackedRun) -> None:
        """Become the publisher of the study, and queue its ended trials that MLflow lacks."""
        self.study, self.parent = study, parent
        self._queue = RetryQueue(UNREACHABLE)
        self._senders: dict[int, MetricSender] = {}
        self._queued: dict[int, int] = {}  # trial -> last epoch in the queue
        study.publisher = self
        for trial in study.trials.values():
            if trial.state != "RUNNING" and not trial.delivered:
                self.on_end(trial)

    def on_start(self, trial: Trial) -> None:
        """Queue the creation of the trial's run."""
        self._queue.put(partial(self._open, trial, self.study.config(trial)))

    def on_report(self, trial: Trial) -> None:
        """Queue the metrics that were reported since the last call."""
        if trial.number not in self._queued:
            self._queued[trial.number] = 0
            self._put_metrics(trial.number, 0, trial.sizes, trial.created_ms)
        for entry in trial.history:
            if entry["epoch"] > self._queued[trial.number]:
                self._put_metrics(trial.number, entry["epoch"], entry["metrics"], entry["timestamp_ms"])
                self._queued[trial.number] = entry["epoch"]
        if trial.final:
            self._put_metrics(trial.number, trial.final["epoch"], trial.final["metrics"], trial.final["timestamp_ms"])

    def on_end(self, trial: Trial) -> None:
        """Queue all data of an ended trial that MLflow may lack; then its file is marked as delivered."""
        config = self.study.config(trial)
        self._queue.put(partial(self._open, trial, config))
        if trial.sizes:
            self.on_report(trial)
        self._queue.put(partial(self._finish, trial, config))

    def interrupt(self) -> None:
        """Queue the status KILLED for the runs of all running trials."""
        for trial in self.study.trials.values():
            if trial.state == "RUNNING":
                self._queue.put(partial(self._interrupt, trial.number))

    def close(self, timeout_s: float) -> int:
        """Wait for the queue as `RetryQueue.close`; returns the number of operations left in it."""
        return self._queue.close(timeout_s)

    def _put_metrics(self, number: int, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        self._queue.put(lambda: self._senders[number].send(step, metrics, timestamp_ms))

    def _open(self, trial: Trial, config: Config) -> None:
        if trial.number in self._senders:
            return
        tags = {PARENT_TAG: self.parent.run_id, TRIAL_TAG: str(trial.number), STATE_TAG: "RUNNING"}
        tags[RUN_ID_TAG] = config.run_id
        if VARIANT in trial.point:
            tags[VARIANT_TAG] = trial.point[VARIANT]
        name, token = self.study.title(trial), f"{self.study.token}-{trial.number}"
        tracked = open_run(self.study.search.study, name, token, config.flatten(), tags)
        self._senders[trial.number] = MetricSender(tracked)

    def _interrupt(self, number: int) -> None:
        if number in self._senders:  # a trial that waits for a slot has no run yet
            finish_run(self._senders[number].tracked, "KILLED")

    def _finish(self, trial: Trial, config: Config) -> None:
        folder = self.study.store.trial_folder(trial.number)
        write_text(folder / "config.yaml", config.to_yaml())
        files, inputs = [folder / "config.yaml"], []
        tags = {STATE_TAG: trial.state, EPOCHS_TAG: str(trial.epochs)}
        if trial.state == "COMPLETE" and (result := _result_of(folder / config.run_id / RESULT)):
            files += write_files(result, folder / "report")
            tags[NOTE_TAG], inputs = peer_markdown(result), dataset_inputs(result)
        if trial.state == "STOPPED":
            tags[REASON_TAG] = f"stopped early after epoch {trial.epochs}"
        elif trial.reason:
            tags[REASON_TAG] = trial.reason
        finish_run(self._senders[trial.number].tracked, _STATUS[trial.state], files, tags, inputs=inputs)
        trial.delivered = True
        self.study.store.write(trial)
        del self._senders[trial.number]


def _result_of(path: Path) -> dict[str, Any] | None:
    """The result in a file; None if there is no file, or, with a warning, if it is damaged."""
    try:
        return read_result(path)
    except StorageUnavailable:
        raise
    except UserError as error:
        warnings.warn(f"{error}; MLflow has no pictures of this trial", stacklevel=2)
        return None
