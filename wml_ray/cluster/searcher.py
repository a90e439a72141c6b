"""The searcher of a study in Ray Tune: interrupted trials first, then start points, then points of Optuna's sampler."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from wml_ray.cluster.resources import max_concurrent_trials
from wml_ray.errors import UserError
from wml_ray.search.optuna_study import OptunaStudy, TrialRecord
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import Trial

if TYPE_CHECKING:
    import optuna

MAX_REJECTED_POINTS = 100  # consecutive suggestions that the config may refuse


class PendingError:
    """The error that ends a study. It is kept until `on_step_end` raises it.

    Ray Tune treats exceptions of a searcher and of all other callbacks as failures of the trial.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def set(self, error: Exception) -> None:
        """Keep an error, unless there is one already."""
        self.error = self.error or error

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Keep an exception of the block instead of raising it."""
        try:
            yield
        except Exception as error:
            self.set(error)


class StudySearcher(Searcher):  # type: ignore[misc]  # Ray is not typed
    """Suggests the trials of a study to Ray Tune and records in Optuna how they end."""

    def __init__(
        self,
        study: RunningStudy,
        optuna_study: OptunaStudy,
        start_points: Sequence[Mapping[str, Any]],
        earlier: Sequence[TrialRecord],
        pending: PendingError,
    ) -> None:
        """`start_points` are tried first; `earlier` are trials of other studies, from which the sampler learns."""
        super().__init__()
        self.study, self.optuna_study, self.pending = study, optuna_study, pending
        self.start_points = list(start_points)
        records = [study.record(trial) for trial in study.trials.values()]
        self.interrupted = optuna_study.sync([*earlier, *records], study.token)  # by label
        self.trials: dict[str, tuple[Trial, optuna.Trial]] = {}  # by Ray Tune's id
        self.live: set[str] = set()
        self.stopped: set[str] = set()  # by the scheduler

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Settings for `train_trial`; None while as many trials run as may run at a time, or the next one must wait."""
        if len(self.live) >= max_concurrent_trials(self.study.space.base, self.study.search) or self._next_must_wait():
            return None
        self.live.add(trial_id)
        self.trials[trial_id] = self._next_interrupted() if self.study.interrupted else self._next_new()
        trial, _ = self.trials[trial_id]
        return {"trial": trial.number, "config": json.dumps(self.study.local_config(trial).model_dump(mode="json"))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store the objective at the end of an epoch."""
        metrics = list(self.study.space.objectives)
        if len(metrics) == 1 and metrics[0] in result and not result.get("past"):
            _, optuna_trial = self.trials[trial_id]
            with self.pending.capture():
                self.optuna_study.report(optuna_trial, result[metrics[0]], result["epoch"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial, or queue it again after a death of its process."""
        trial, optuna_trial = self.trials[trial_id]
        self.live.discard(trial_id)
        with self.pending.capture():
            if error and not trial.reason and self.study.record_death(trial):
                # Ray Tune reports the death of a reused actor twice, and ends the trial at the second report
                self.interrupted[self.study.label(trial)] = optuna_trial
                self.study.interrupted.append(trial)
                return
            failed = error or bool(trial.reason)
            self.study.on_end(trial, "failed" if failed else "stopped" if trial_id in self.stopped else "returned")
            self.optuna_study.finish(optuna_trial, self.study.record(trial))

    def save(self, checkpoint_path: str) -> None:
        """Create the file that Ray Tune requires; a study continues from its trial files."""
        Path(checkpoint_path).touch()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # for the same reason

    def _next_must_wait(self) -> bool:
        number = len(self.study.trials)
        if self.study.interrupted or number >= len(self.start_points):
            return False
        needed = self.study.space.needed_point(self.start_points[number])
        return any(trial.point == needed for trial in self.study.trials.values() if trial.state == "RUNNING")

    def _next_interrupted(self) -> tuple[Trial, optuna.Trial]:
        trial = self.study.interrupted.pop(0)
        return trial, self.interrupted[self.study.label(trial)]

    def _next_new(self) -> tuple[Trial, optuna.Trial]:
        for _ in range(MAX_REJECTED_POINTS):
            number = len(self.study.trials)
            if number < len(self.start_points):
                self.optuna_study.enqueue(self.start_points[number])
            optuna_trial = self.optuna_study.ask()
            try:
                self.study.space.config(optuna_trial.params)
            except UserError as error:
                reason = str(error)
                self.optuna_study.fail(optuna_trial)
                continue
            trial = self.study.add_trial(optuna_trial.params, self.optuna_study.system_attributes(optuna_trial))
            self.optuna_study.set_label(optuna_trial, self.study.label(trial))
            return trial, optuna_trial
        raise UserError(f"the config refuses {MAX_REJECTED_POINTS} suggestions in a row; narrow the space: {reason}")
