"""A study under Ray Tune: OptunaSearch suggests, ASHA or median stopping stops, an actor trains trial after trial."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.search.optuna import OptunaSearch
from ray.tune.trainable import wrap_function
from ray.util.placement_group import PlacementGroup, remove_placement_group

from wml_ray.cluster.connect import WorkerEnvironment, ray_folder
from wml_ray.cluster.resources import has_several_workers, max_concurrent_trials, trial_resources
from wml_ray.cluster.schedulers import make_scheduler, replay
from wml_ray.cluster.trial import STOP_TIMEOUT_S, train_trial
from wml_ray.errors import UserError, root_cause
from wml_ray.search.optuna_study import (
    LABEL,
    TrialRecord,
    enqueue,
    fail_trial,
    finish_trial,
    make_sampler,
    sampler_attributes,
    storage_errors,
    sync_trials,
)
from wml_ray.search.space import Space, encoded
from wml_ray.search.study import Study
from wml_ray.search.trials import Trial
from wml_ray.tracking.client import redacted

STORAGE_TIMEOUT_S = 60.0  # how long a study waits for a storage that went away
REFUSED_POINTS = 100  # suggestions in a row that the config may refuse
TrialFunction = Callable[..., None]  # takes settings and worker_environment


def run_trials(
    sweep: Study,
    storage: Any,
    start_points: Sequence[Mapping[str, Any]] = (),
    earlier: Sequence[TrialRecord] = (),
    verbose: bool = False,
    trial_function: TrialFunction | None = None,
) -> None:
    """Run the trials the study still lacks; `storage` is Optuna's.

    `start_points` are tried first; `earlier` are trials of other studies.
    `trial_function` takes the place of `train_trial` in the trials' actors.

    Raises:
        UserError: the cluster cannot hold one trial, or Optuna's storage or that of the results does not answer.
    """
    _quieten(verbose)
    while sweep.to_do:  # a second time for a trial that Ray Tune gave up sooner than it may
        _search(sweep, storage, start_points, earlier, verbose, trial_function or train_trial)


def _search(
    sweep: Study,
    storage: Any,
    start_points: Sequence[Mapping[str, Any]],
    earlier: Sequence[TrialRecord],
    verbose: bool,
    trial_function: TrialFunction,
) -> None:
    space, settings, halt = sweep.space, sweep.search, _Halt()
    searcher = _Searcher(sweep, storage, start_points, earlier, halt)
    scheduler = make_scheduler(settings, space, searcher.stopped)
    replay(scheduler, sweep)
    of_ray = ray_folder(sweep.folder)
    worker_environment = WorkerEnvironment.capture(sweep.folder, sweep.lease)
    function, several = partial(trial_function, worker_environment=worker_environment), has_several_workers(space.base)
    # Ray Tune refuses to start an actor that asks for nothing
    resources = {"memory": 2.0**20} if several else trial_resources(space.base)
    tuner = ray.tune.Tuner(
        _trainable(function, resources),
        tune_config=ray.tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=sweep.to_do,
            reuse_actors=not several,  # an actor that is kept would keep the places of its workers
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray.tune.RunConfig(
            name=uuid.uuid4().hex,  # the ledger is what a study resumes from, never Ray's state
            storage_path=str(of_ray),
            failure_config=ray.tune.FailureConfig(max_failures=space.base.scale.max_failures),
            callbacks=[_Events(sweep, halt)],
            verbose=2 if verbose else 0,
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(of_ray, ignore_errors=True)


class _Halt:
    """What ends the study: kept until the end of a step, for before Ray Tune blames what we raise on the trial."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # raised again by `_Events.on_step_end`
            self.error = self.error or error


class _Searcher(OptunaSearch):  # type: ignore[misc]  # Ray is not typed
    """OptunaSearch on the trials of a sweep: interrupted ones first, then start points, then what Optuna asks for."""

    def __init__(
        self,
        sweep: Study,
        storage: Any,
        start_points: Sequence[Mapping[str, Any]],
        earlier: Sequence[TrialRecord],
        halt: _Halt,
    ) -> None:
        self.sweep, self.start_points, self.halt = sweep, list(start_points), halt
        space, settings = sweep.space, sweep.search
        modes, metrics = list(space.objectives.values()), list(space.objectives)
        self.distributions = self.convert_search_space(_domains(space))
        super().__init__(
            self.distributions,
            metric=metrics if len(metrics) > 1 else metrics[0],
            mode=modes if len(modes) > 1 else modes[0],
            # not the draws of the first start again, when a study is continued
            sampler=make_sampler(settings.sampler, settings.seed + len(sweep.trials), settings.trials),
            study_name=settings.study,
            storage=storage,
        )
        known = [sweep.known(trial) for trial in sweep.trials.values()]
        self.interrupted = self._patiently(
            lambda: sync_trials(self._ot_study, self.distributions, [*earlier, *known], sweep.token)
        )
        self.trial_of: dict[str, Trial] = {}
        self.live: set[str] = set()
        self.stopped: set[str] = set()  # by the scheduler

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if len(self.live) >= max_concurrent_trials(self.sweep.space.base, self.sweep.search):
            return None
        self.live.add(trial_id)
        trial = self._interrupted(trial_id) or self._new(trial_id)
        self.trial_of[trial_id] = trial
        return {"trial": trial.number, "config": json.dumps(self.sweep.placed_config(trial).model_dump(mode="json"))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        metrics = list(self.sweep.space.objectives)
        if len(metrics) == 1 and metrics[0] in result and not result.get("past"):
            with self.halt.kept():
                self._patiently(lambda: self._ot_trials[trial_id].report(result[metrics[0]], result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial, asked = self.trial_of[trial_id], self._ot_trials[trial_id]
        self.live.discard(trial_id)
        with self.halt.kept():
            if error and not trial.reason and self.sweep.may_die_again(trial):
                # the death of a process that was kept for this trial is told twice, and the second ends the trial
                self.interrupted[self.sweep.label(trial)] = asked
                self.sweep.waiting.append(trial)
                return
            failed = error or bool(trial.reason)
            self.sweep.ended(trial, "failed" if failed else "stopped" if trial_id in self.stopped else "returned")
            self._patiently(lambda: finish_trial(self._ot_study, asked, self.sweep.known(trial)))

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray writes it to disk, where nobody reads it: the ledger is the only memory

    def _interrupted(self, trial_id: str) -> Trial | None:
        if not self.sweep.waiting:
            return None
        trial = self.sweep.waiting.pop(0)
        self._ot_trials[trial_id] = self.interrupted[self.sweep.label(trial)]
        return trial

    def _new(self, trial_id: str) -> Trial:
        for _ in range(REFUSED_POINTS):
            number = len(self.sweep.trials)
            if number < len(self.start_points):
                self._patiently(lambda: enqueue(self._ot_study, self.start_points[number]))  # noqa: B023  called at once
            asked = self._patiently(lambda: self._ot_study.ask(fixed_distributions=self.distributions))
            try:
                self.sweep.space.config(asked.params)
            except UserError as error:
                refused = str(error)
                self._patiently(lambda: fail_trial(self._ot_study, asked))  # noqa: B023
                continue
            trial = self.sweep.begin(asked.params, self._patiently(lambda: sampler_attributes(self._ot_study, asked)))  # noqa: B023
            self._ot_trials[trial_id] = asked
            self._patiently(lambda: asked.set_user_attr(LABEL, self.sweep.label(trial)))  # noqa: B023
            return trial
        raise UserError(f"the config refuses {REFUSED_POINTS} suggestions in a row; narrow the space: {refused}")

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """A call to the storage, again for a minute if its database is away; what it knows then can be mended later.

        Raises:
            UserError: it stays away.
        """
        deadline_s = time.monotonic() + STORAGE_TIMEOUT_S
        while True:
            try:
                return call()
            except storage_errors() as error:
                if time.monotonic() > deadline_s:
                    url = redacted(self.sweep.search.storage or "memory")
                    raise UserError(
                        f"storage '{url}' does not answer ({root_cause(error)}); "
                        "run the same command again when it does: the study continues"
                    ) from None
                time.sleep(1)


class _Events(ray.tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """What Ray Tune sees of its trials, told to the sweep."""

    def __init__(self, sweep: Study, halt: _Halt) -> None:
        self.sweep, self.halt = sweep, halt
        self.places: dict[str, PlacementGroup] = {}  # of the workers, by trial

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as that of the searcher

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        with self.halt.kept():
            self.sweep.started(self._trial(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "failed" in result:
            self._trial(trial).reason = result["failed"]
            trial.max_failures = 0  # it would fail again in the same way
        elif "halted" in result:
            self.halt.error = self.halt.error or UserError(result["halted"])
        elif "placed" in result:
            self.places[trial.trial_id] = result["placed"]
        elif "epoch" in result:
            with self.halt.kept():
                self.sweep.reported(self._trial(trial), result["report"])

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if self.halt.error:
            raise self.halt.error

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.sweep.may_die_again(self._trial(trial))
        self._free(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._free(trial)

    def _free(self, trial: Any) -> None:
        """Give back the workers' places of a trial whose process died."""
        if trial.trial_id in self.places:
            remove_placement_group(self.places.pop(trial.trial_id))

    def _trial(self, trial: Any) -> Trial:
        return self.sweep.trials[trial.config["trial"]]


def _trainable(function: Callable[[dict[str, Any]], None], resources: dict[str, float]) -> Any:
    """For Ray Tune; unlike its own it does not end before the function, which may have workers to give back."""

    class Trainable(wrap_function(function)):  # type: ignore[misc]  # Ray is not typed
        def setup(self, config: dict[str, Any]) -> None:
            self.training = threading.Lock()
            super().setup(config)

        def _trainable_func(self, config: dict[str, Any]) -> None:
            with self.training:
                super()._trainable_func(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            if not super().reset_config(new_config):
                raise RuntimeError("the trial before has not ended")  # of False the searcher would never hear
            return True

        def cleanup(self) -> None:
            super().cleanup()  # a report of the function now ends it
            self.training.acquire(timeout=STOP_TIMEOUT_S)

    return ray.tune.with_resources(Trainable, resources)


def _domains(space: Space) -> dict[str, Any]:
    """Ray Tune's domains, with categories as Optuna takes them."""
    domains = space.parameters(ray.tune.uniform)
    for key, domain in domains.items():
        if hasattr(domain, "categories"):
            domains[key] = ray.tune.choice([encoded(category) for category in domain.categories])
    return domains


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:04d}-{trial.trial_id}"


def _quieten(verbose: bool) -> None:
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # MLflow has it all
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a failure is reported without metrics
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is KeyboardInterrupt, as everywhere
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(10**9))  # nobody reads Ray's state
    os.environ["RAY_AIR_NEW_OUTPUT"] = str(int(verbose))  # the new output speaks of failures however quiet it is to be
    if not verbose:
        for name in ("ray.tune", "ray.train", "ray.data", "optuna"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
