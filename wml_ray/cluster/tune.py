"""A study under Ray Tune: suggestions of Optuna, ASHA or median stopping, and actors that train trial after trial."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.tune
from ray.tune.execution import class_cache
from ray.tune.trainable import wrap_function
from ray.util.placement_group import PlacementGroup, remove_placement_group

from wml_ray.cluster.connect import WorkerEnvironment, ray_folder
from wml_ray.cluster.resources import has_several_workers, trial_resources
from wml_ray.cluster.schedulers import make_scheduler, replay
from wml_ray.cluster.searcher import PendingError, StudySearcher
from wml_ray.cluster.trial import STOP_TIMEOUT_S, train_trial
from wml_ray.search.optuna_study import OptunaStudy, TrialRecord
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import Trial
from wml_ray.storage.retry import StorageUnavailable

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

TrialFunction = Callable[..., None]  # with the parameters of `train_trial`


def run_trials(
    study: RunningStudy,
    storage: BaseStorage,
    start_points: Sequence[Mapping[str, Any]] = (),
    earlier: Sequence[TrialRecord] = (),
    verbose: bool = False,
    trial_function: TrialFunction | None = None,
) -> None:
    """Run the remaining trials of a study; `storage` is Optuna's.

    `start_points` are tried first; `earlier` are trials of other studies, from which the sampler learns.
    `trial_function` replaces `train_trial` in the trials' actors.

    Raises:
        UserError: the cluster cannot hold one trial.
        StorageUnavailable: Optuna's storage or that of the results failed for too long, or the lease was lost.
    """
    _configure_output(verbose)
    _keep_credentials_out_of_actors()
    while study.remaining:  # again for trials that Ray Tune ended before `scale.max_failures` deaths
        optuna_study = OptunaStudy(study.space, study.search, storage, started=len(study.trials))
        pending = PendingError()
        searcher = StudySearcher(study, optuna_study, start_points, earlier, pending)
        _fit(study, searcher, _StudyCallback(study, pending), verbose, trial_function or train_trial)


def _fit(
    study: RunningStudy, searcher: StudySearcher, callback: _StudyCallback, verbose: bool, trial_function: TrialFunction
) -> None:
    """Run Ray Tune once."""
    config = study.space.base
    scheduler = make_scheduler(study.search, study.space, searcher.stopped)
    replay(scheduler, study)
    several_workers = has_several_workers(config)
    worker_environment = WorkerEnvironment.capture(study.folder, study.space.base.data, study.lease).send()
    function = partial(trial_function, worker_environment=worker_environment)
    # an actor that starts workers needs no CPU, but Ray Tune refuses actors without resources
    resources = {"memory": 2.0**20} if several_workers else trial_resources(config)
    folder = ray_folder(study.folder)
    tuner = ray.tune.Tuner(
        _trainable(function, resources),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=study.remaining,
            reuse_actors=not several_workers,  # a reused actor would keep the slots of its workers
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name=uuid.uuid4().hex,  # a study continues from its trial files, never from Ray's state
            storage_path=str(folder),
            failure_config=ray.tune.FailureConfig(max_failures=config.scale.max_failures),
            callbacks=[callback],
            verbose=2 if verbose else 0,
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _StudyCallback(ray.tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """Passes the events of Ray Tune's trials to the study."""

    def __init__(self, study: RunningStudy, pending: PendingError) -> None:
        self.study, self.pending = study, pending
        self.placement_groups: dict[str, PlacementGroup] = {}  # of the workers, by Ray Tune's id of the trial

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune writes it to disk; a study continues from its trial files

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        with self.pending.capture():
            self.study.on_start(self._trial(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "failed" in result:
            self._trial(trial).reason = result["failed"]
            trial.max_failures = 0  # the same error would come again
        elif "study_error" in result:
            self.pending.set(StorageUnavailable(result["study_error"]))
        elif "placement_group" in result:
            self.placement_groups[trial.trial_id] = result["placement_group"]
        elif "epoch" in result:
            with self.pending.capture():
                self.study.on_report(self._trial(trial), json.loads(result["report"]))

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self.pending.error:
            raise self.pending.error

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.study.record_death(self._trial(trial))
        self._remove_placement_group(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._remove_placement_group(trial)

    def _remove_placement_group(self, trial: Any) -> None:
        """Free the slots of the workers of a trial whose process died."""
        if trial.trial_id in self.placement_groups:
            remove_placement_group(self.placement_groups.pop(trial.trial_id))

    def _trial(self, trial: Any) -> Trial:
        return self.study.trials[trial.config["trial"]]


def _trainable(function: Callable[[dict[str, Any]], None], resources: dict[str, float]) -> Any:
    """A trainable that ends only after `function` has returned, so that its workers' slots are free."""

    class Trainable(wrap_function(function)):  # type: ignore[misc]  # Ray is not typed
        def setup(self, config: dict[str, Any]) -> None:
            self.training = threading.Lock()
            super().setup(config)

        def _trainable_func(self, config: dict[str, Any]) -> None:
            with self.training:
                super()._trainable_func(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not super().reset_config(new_config):
                raise RuntimeError("the previous trial has not ended")  # Ray Tune does not pass False to the searcher
            return True

        def cleanup(self) -> None:
            super().cleanup()  # ends the function at its next report
            self.training.acquire(timeout=STOP_TIMEOUT_S)

    return ray.tune.with_resources(Trainable, resources)


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:04d}-{trial.trial_id}"


def _keep_credentials_out_of_actors() -> None:
    """Make Ray Tune pass no AWS_* variable to a trial's actor: Ray logs them and its state API shows them.

    Trials receive them from `WorkerEnvironment`.
    """
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def _configure_output(verbose: bool) -> None:
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # the metrics are in MLflow
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failure is reported without metrics
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C raises KeyboardInterrupt
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(10**9))  # Ray's state is not used
    os.environ["RAY_AIR_NEW_OUTPUT"] = str(int(verbose))  # the new output prints failures at any verbosity
    if not verbose:
        for name in ("ray.tune", "ray.train", "ray.data", "optuna"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
