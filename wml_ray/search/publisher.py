"""Trials of a study as child runs in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from wml_ray.config.schema import Config
from wml_ray.report.run_report import peer_markdown, write_files
from wml_ray.search.trials import Trial
from wml_ray.storage.files import read_json, write_text
from wml_ray.storage.retry import RetryQueue
from wml_ray.tracking.origin import dataset_splits
from wml_ray.tracking.runs import UNREACHABLE, MetricSender, TrackedRun, finish_run, open_run
from wml_ray.tracking.tags import (
    EPOCHS_TAG,
    NOTE_TAG,
    PARENT_TAG,
    REASON_TAG,
    RUN_ID_TAG,
    STATE_TAG,
    TRIAL_TAG,
    TrialState,
)
from wml_ray.training.result import RESULT

_STATUS: dict[TrialState, str] = {"COMPLETE": "FINISHED", "STOPPED": "FINISHED", "FAILED": "FAILED"}


class Publisher:
    """Trials as children of the study's MLflow run. All of it happens in one thread, in order and exactly once."""

    def __init__(self, experiment: str, parent: TrackedRun, token: str) -> None:
        self.experiment, self.parent, self.token = experiment, parent, token
        self._deliveries = RetryQueue(UNREACHABLE)
        self._senders: dict[int, MetricSender] = {}
        self._sent: dict[int, int] = {}  # trial -> last epoch queued

    def open(self, trial: Trial, config: Config) -> None:
        self._deliveries.put(partial(self._open, trial, config))

    def log(self, trial: Trial) -> None:
        """Queue what the trial has reported since the last call."""
        if trial.number not in self._sent:
            self._sent[trial.number] = 0
            self._put(trial.number, 0, trial.sizes, trial.created_ms)
        for entry in trial.history:
            if entry["epoch"] > self._sent[trial.number]:
                self._put(trial.number, entry["epoch"], entry["metrics"], entry["timestamp_ms"])
                self._sent[trial.number] = entry["epoch"]
        if trial.final:
            self._put(trial.number, trial.final["epoch"], trial.final["metrics"], trial.final["timestamp_ms"])

    def interrupt(self, trial: Trial) -> None:
        self._deliveries.put(partial(self._interrupt, trial.number))

    def close_trial(self, trial: Trial, config: Config, run_folder: Path, remember: Callable[[], None]) -> None:
        """Queue all that MLflow may lack of an ended trial; `remember` is called when it has it."""
        self.open(trial, config)
        if trial.sizes:
            self.log(trial)
        self._deliveries.put(partial(self._close, trial, config, run_folder, remember))

    def close(self, timeout_s: float) -> int:
        return self._deliveries.close(timeout_s)

    def _put(self, number: int, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        self._deliveries.put(lambda: self._senders[number].send(step, metrics, timestamp_ms))

    def _open(self, trial: Trial, config: Config) -> None:
        if trial.number in self._senders:
            return
        tags = {PARENT_TAG: self.parent.run_id, TRIAL_TAG: str(trial.number), STATE_TAG: "RUNNING"}
        tags[RUN_ID_TAG] = config.run_id
        name, token = f"trial {trial.number}", f"{self.token}-{trial.number}"
        tracked = open_run(self.experiment, name, token, config.flatten(), tags)
        self._senders[trial.number] = MetricSender(tracked)

    def _interrupt(self, number: int) -> None:
        if number in self._senders:  # else it was still to start
            finish_run(self._senders[number].tracked, "KILLED")

    def _close(self, trial: Trial, config: Config, run_folder: Path, remember: Callable[[], None]) -> None:
        folder = run_folder.parent
        write_text(folder / "config.yaml", config.to_yaml())
        files, splits = [folder / "config.yaml"], []
        tags = {STATE_TAG: trial.state, EPOCHS_TAG: str(trial.epochs)}
        if trial.state == "COMPLETE" and (result := read_json(run_folder / RESULT)):
            files += write_files(result, folder / "report")
            tags[NOTE_TAG], splits = peer_markdown(result), dataset_splits(result)
        if trial.state == "STOPPED":
            tags[REASON_TAG] = f"stopped early after epoch {trial.epochs}"
        elif trial.reason:
            tags[REASON_TAG] = trial.reason
        finish_run(self._senders[trial.number].tracked, _STATUS[trial.state], files, tags, splits=splits)
        trial.delivered = True
        remember()
        del self._senders[trial.number]
