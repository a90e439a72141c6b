"""A study as its driver keeps it: which trials there are, what becomes of them, and their way into MLflow."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from wml_ray import report, session, tracking
from wml_ray.config import Config, UserError, with_values
from wml_ray.delivery import Deliveries
from wml_ray.ledger import Ledger, Trial
from wml_ray.lock import Claim
from wml_ray.records import EPOCHS_TAG, PARENT_TAG, STATE_TAG, TRIAL_TAG
from wml_ray.space import SearchConfig, Space
from wml_ray.storage import read_json, write_text
from wml_ray.study import Known, State
from wml_ray.tracking import REASON_TAG, Sender, TrackedRun

DIED = "its process died (killed, out of memory, or its node was lost)"
_STATUS: dict[State, str] = {"COMPLETE": "FINISHED", "STOPPED": "FINISHED", "FAILED": "FAILED"}


class Sweep:
    """The trials of a study. Whatever is not in its ledger has not happened; what is there is never done again."""

    def __init__(
        self,
        space: Space,
        search: SearchConfig,
        folder: Path,
        token: str,
        on_change: Callable[[Sweep], None] | None = None,
        claim: Claim | None = None,
    ) -> None:
        """`token` is that of the study, which MLflow and Optuna know it by; `claim` is on its folder."""
        self.space, self.search, self.folder, self.token = space, search, folder, token
        self.ledger, self.claim = Ledger(folder, claim), claim
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
        trial = Trial(number, dict(point), created_ms=session.now_ms(), sampler_notes=sampler_notes)
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

    def known(self, trial: Trial) -> Known:
        """A trial as Optuna is to know it."""
        metrics = list(self.space.objectives)
        steps = (
            {} if len(metrics) > 1 else {entry["epoch"]: entry["metrics"].get(metrics[0]) for entry in trial.history}
        )
        steps = {epoch: value for epoch, value in steps.items() if value is not None}
        values = self.values(trial) if trial.state == "COMPLETE" else None
        return Known(self.label(trial), trial.point, trial.state, values, steps, trial.sampler_notes)

    def values(self, trial: Trial) -> list[float]:
        """What a complete trial came to, an entry an objective."""
        results = trial.results()
        return [results[metric] for metric in self.space.objectives]

    def counts(self) -> Counter[State]:
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

    def _state(self, trial: Trial, end: str) -> State:
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


class Publisher:
    """Trials as children of the study's MLflow run. All of it happens in one thread, in order and exactly once."""

    def __init__(self, experiment: str, parent: TrackedRun, token: str) -> None:
        self.experiment, self.parent, self.token = experiment, parent, token
        self._deliveries = Deliveries(tracking.SILENT)
        self._senders: dict[int, Sender] = {}
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
        tags["wml_ray.run_id"] = config.run_id
        name, token = f"trial {trial.number}", f"{self.token}-{trial.number}"
        tracked = tracking.open_run(self.experiment, name, token, config.flatten(), tags)
        self._senders[trial.number] = Sender(tracked)

    def _interrupt(self, number: int) -> None:
        if number in self._senders:  # else it was still to start
            tracking.finish_run(self._senders[number].tracked, "KILLED")

    def _close(self, trial: Trial, config: Config, run_folder: Path, remember: Callable[[], None]) -> None:
        folder = run_folder.parent
        write_text(folder / "config.yaml", config.to_yaml())
        files = [folder / "config.yaml"]
        if trial.state == "COMPLETE" and (result := read_json(run_folder / session.RESULT)):
            files += report.write_files(result, folder / "report")
        tags = {STATE_TAG: trial.state, EPOCHS_TAG: str(trial.epochs)}
        if trial.state == "STOPPED":
            tags[REASON_TAG] = f"stopped early after epoch {trial.epochs}"
        elif trial.reason:
            tags[REASON_TAG] = trial.reason
        tracking.finish_run(self._senders[trial.number].tracked, _STATUS[trial.state], files, tags)
        trial.delivered = True
        remember()
        del self._senders[trial.number]


def start_points(path: Path, space: Space) -> list[dict[str, Any]]:
    """Points that are tried before the sampler is asked: a YAML list of config keys and values, the rest as the config.

    Raises:
        UserError: no such file, or a point that the space does not hold.
    """
    import yaml

    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"start points {path}: {' '.join(str(error).split())}; give a YAML list of points") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"start points {path}: must be a YAML list such as [{{wml.alpha: 0.3}}, {{wml.alpha: 0.7}}]")
    searched = {*space.domains, *space.searched}
    points = []
    for entry in entries:
        others = [key for key in entry if key not in searched]
        if others:
            raise UserError(
                f"start points {path}: {others[0]} is not searched; searched are {', '.join(space.domains)}"
            )
        try:
            points.append(space.point(with_values(space.base, entry)))
        except UserError as error:
            raise UserError(f"start points {path}: {error}; what a point leaves out is as in the config") from None
    return points
