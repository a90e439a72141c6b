"""A study in Optuna: its storage, its sampler, and its trials, which follow the trial files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState as OptunaState

from wml_ray.errors import UserError, number_of, root_cause
from wml_ray.search.bounded_tpe import BoundedTPE
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space, count_values
from wml_ray.storage.retry import StorageUnavailable, retry_for
from wml_ray.tracking.client import redacted
from wml_ray.tracking.tags import TrialState

TRIAL_ATTRIBUTE = "wml_ray.trial"  # user attribute of Optuna's trials: study and number
TOKEN_ATTRIBUTE = "wml_ray.token"  # user attribute of Optuna's studies: the token of the study's folder
STARTUP_TRIALS = 5  # random trials before TPE and GP; half of Optuna's default, because each trial is a training
LIAR_TRIALS = 200  # largest study with constant_liar, which rereads all trials for each suggestion
DATABASE_TIMEOUT_S = 60.0  # how long calls are retried while the database is unreachable
_STATES = {"COMPLETE": OptunaState.COMPLETE, "STOPPED": OptunaState.PRUNED, "FAILED": OptunaState.FAIL}
T = TypeVar("T")


@dataclass(frozen=True)
class TrialRecord:
    """A trial as Optuna stores it."""

    label: str
    """Study and number."""
    point: dict[str, Any]
    state: TrialState
    values: list[float] | None
    """One value for each objective, of COMPLETE trials."""
    intermediate: dict[int, float]
    """Epoch -> objective; empty with several objectives."""
    system_attributes: dict[str, Any] = field(default_factory=dict)
    """Values that the sampler stored with the trial, such as its generation."""


class _GridSampler(optuna.samplers.BruteForceSampler):
    """Each point of a finite space once. Optuna's GridSampler needs trials that are numbered without gaps."""

    def after_trial(self, *_: object) -> None:
        """Do nothing; Optuna would end its own loop, which a study under Ray Tune does not have."""


def check_sampler(search: SearchConfig, space: Space) -> None:
    """Check that the sampler of `search` can suggest points of the space.

    Raises:
        UserError: it cannot.
    """
    where = f"sampler = '{search.sampler}'"
    if search.sampler == "cmaes":
        choices = [key for key, domain in space.domains.items() if isinstance(domain, CategoricalDistribution)]
        if choices or len(space.objectives) > 1:
            problem = f"'{choices[0]}' is a choice" if choices else f"there are {len(space.objectives)} objectives"
            raise UserError(f"{where} needs numbers only, and one objective, but {problem}; use sampler tpe or gp")
    if search.sampler == "grid":
        counts = {key: count_values(domain) for key, domain in space.domains.items()}
        endless = next((key for key, count in counts.items() if count is None), None)
        if endless:
            raise UserError(
                f"{where} needs a finite space: '{endless}' has no steps; use quniform or choice there, or sampler tpe"
            )
        points = math.prod(count for count in counts.values() if count is not None)
        if search.trials > points:
            raise UserError(f"trials = {search.trials}: the grid has {number_of(points, 'point')}; use at most so many")


def make_sampler(name: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler of this name in `SearchConfig`, for a study of so many trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "grid":
            return _GridSampler(seed=seed)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        if name == "cmaes":  # stopped trials count with their last value, else early stopping would leave it few trials
            return optuna.samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
        if name == "nsga2":  # at least five generations; the first is random
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(max(trials // 5, 4), 50))
        # constant_liar counts running trials as bad, so that concurrent trials are spread over the space
        return BoundedTPE(
            seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=trials <= LIAR_TRIALS
        )


def open_storage(url: str | None, name: str, token: str | None) -> optuna.storages.BaseStorage:
    """Optuna's storage at `url` for the study `name` with this token; in memory without `url`.

    `token` is None for a study that has not begun.

    Raises:
        UserError: the database cannot be opened, or it contains a study of this name with another token.
    """
    if url is None:
        return optuna.storages.InMemoryStorage()
    try:
        # pool_pre_ping opens new connections after a restart of the server
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        studies = {study.study_name: study for study in storage.get_all_studies()}
    except Exception as error:  # each database driver has exceptions of its own
        raise UserError(
            f"storage '{redacted(url)}' cannot be opened ({root_cause(error)}); write sqlite:///FILE, "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or leave it out to keep the study in memory"
        ) from None
    if name in studies and studies[name].user_attrs.get(TOKEN_ATTRIBUTE) not in (token or "", None):
        raise UserError(
            f"storage '{redacted(url)}' contains another study named '{name}'; choose another name with --study, or "
            f"delete that study: optuna delete-study --study-name {name} --storage URL"
        )
    return storage


class OptunaStudy:
    """The study in Optuna. Its calls are retried while the database is unreachable.

    All methods raise StorageUnavailable if the database stays unreachable for `DATABASE_TIMEOUT_S`.
    """

    def __init__(self, space: Space, search: SearchConfig, storage: optuna.storages.BaseStorage, started: int) -> None:
        """`started` is the number of trials so far; it enters the seed, so that a continued study draws new points."""
        self._distributions: dict[str, BaseDistribution] = {**space.distributions}
        self._url = search.storage or "memory"
        self._study = self._retry(
            lambda: optuna.create_study(
                storage=storage,
                sampler=make_sampler(search.sampler, search.seed + started, search.trials),
                pruner=optuna.pruners.NopPruner(),
                study_name=search.study,
                directions=["minimize" if mode == "min" else "maximize" for mode in space.objectives.values()],
                load_if_exists=True,
            )
        )

    def sync(self, records: Sequence[TrialRecord], token: str) -> dict[str, optuna.Trial]:
        """Make Optuna's trials equal to `records`; returns the RUNNING ones by label.

        Optuna's running trials without a record were created just before a driver died; they become failed.
        """
        return self._retry(lambda: self._sync(records, token))

    def ask(self) -> optuna.Trial:
        """A new trial: at the enqueued point if there is one, else at a point of the sampler."""
        return self._retry(lambda: self._study.ask(fixed_distributions=self._distributions))

    def enqueue(self, point: Mapping[str, Any]) -> None:
        """Make the next `ask` return this point. A point that a dead driver enqueued is used first."""
        self._retry(lambda: self._enqueue(point))

    def set_label(self, trial: optuna.Trial, label: str) -> None:
        """Store the label of a trial, by which `sync` finds it."""
        self._retry(lambda: trial.set_user_attr(TRIAL_ATTRIBUTE, label))

    def system_attributes(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values that the sampler stored with a trial and may read in later ones."""
        return dict(self._retry(lambda: self._study._storage.get_trial(trial._trial_id).system_attrs))

    def report(self, trial: optuna.Trial, value: float, epoch: int) -> None:
        """Store the objective at the end of an epoch."""
        self._retry(lambda: trial.report(value, epoch))

    def finish(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Store the end of a trial. With one objective a stopped trial keeps its last value."""
        self._retry(lambda: self._finish(trial, record))

    def fail(self, trial: optuna.Trial) -> None:
        """Mark a trial that is not trained as failed."""
        self._retry(lambda: self._study.tell(trial, state=OptunaState.FAIL))

    def _sync(self, records: Sequence[TrialRecord], token: str) -> dict[str, optuna.Trial]:
        self._study.set_user_attr(TOKEN_ATTRIBUTE, token)
        trials = self._study.get_trials(deepcopy=False)
        stored = {trial.user_attrs.get(TRIAL_ATTRIBUTE, trial._trial_id): trial for trial in trials}
        by_label = {record.label: record for record in records}
        running: dict[str, optuna.Trial] = {}
        for label, record in by_label.items():
            trial = stored.get(label)
            if record.state == "RUNNING":
                if trial is None or trial.state.is_finished():
                    running[label] = self._add(record)
                else:
                    running[label] = optuna.Trial(self._study, trial._trial_id)
            elif trial is None:
                self._study.add_trial(self._frozen(record))
            elif not trial.state.is_finished():
                self._study.tell(trial.number, record.values, _STATES[record.state])
        for label, trial in stored.items():
            if label not in by_label and trial.state == OptunaState.RUNNING:
                self._study.tell(trial.number, state=OptunaState.FAIL)
        return running

    def _add(self, record: TrialRecord) -> optuna.Trial:
        self._enqueue(record.point)
        trial = self._study.ask(fixed_distributions=self._distributions)
        trial.set_user_attr(TRIAL_ATTRIBUTE, record.label)
        return trial

    def _enqueue(self, point: Mapping[str, Any]) -> None:
        if not self._study.get_trials(deepcopy=False, states=[OptunaState.WAITING]):
            self._study.enqueue_trial(dict(point))

    def _finish(self, trial: optuna.Trial, record: TrialRecord) -> None:
        for epoch, value in record.intermediate.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of epochs that were reported before
                trial.report(value, epoch)
        self._study.tell(trial, record.values, _STATES[record.state])

    def _frozen(self, record: TrialRecord) -> optuna.trial.FrozenTrial:
        last_value = list(record.intermediate.values())[-1:] if record.state == "STOPPED" else []
        return optuna.trial.create_trial(
            state=_STATES[record.state],
            params=record.point,
            distributions=self._distributions,
            values=record.values or last_value or None,
            intermediate_values=record.intermediate,
            user_attrs={TRIAL_ATTRIBUTE: record.label},
            system_attrs=record.system_attributes,
        )

    def _retry(self, call: Callable[[], T]) -> T:
        return retry_for(call, DATABASE_TIMEOUT_S, optuna.exceptions.StorageInternalError, self._unavailable)

    def _unavailable(self, error: Exception) -> StorageUnavailable:
        return StorageUnavailable(
            f"storage '{redacted(self._url)}' does not respond ({root_cause(error)}); run the same command again once "
            "it does: the study continues"
        )
