"""A study in Optuna: sampler, storage, and trials kept in line with the trial files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wml_ray.errors import UserError, root_cause
from wml_ray.tracking.client import redacted
from wml_ray.tracking.tags import TrialState

if TYPE_CHECKING:
    import optuna


LABEL = "wml_ray.trial"  # user attribute of Optuna's trials: study and number
OWNER = "wml_ray.token"  # user attribute of Optuna's studies: whose it is
STARTUP_TRIALS = 5  # drawn at random before TPE: half of Optuna's, for here a trial is a training
LIAR_TRIALS = 200  # up to so many trials, TPE looks at those that still run


def make_sampler(name: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """A sampler by its name in `SearchConfig`, for a study of so many trials."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if name == "nsga2":  # five generations at least: the first is random, and Optuna's is of 50
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(max(trials // 5, 4), 50))
        # constant_liar: trials that still run count as bad, so that those beside them look elsewhere; it reads the
        # whole history anew for every suggestion, which in a long study costs more than it gives
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=trials <= LIAR_TRIALS
        )


def open_storage(url: str | None, name: str, token: str | None) -> optuna.storages.BaseStorage:
    """The storage of the study `name`, whose owner knows `token`; None if it has not begun.

    Raises:
        UserError: no database answers at the address, or it holds a study of this name that is another's.
    """
    import optuna

    if url is None:
        return optuna.storages.InMemoryStorage()
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # outlives a restarted server
        there = {study.study_name: study for study in storage.get_all_studies()}
    except Exception as error:  # whatever the database's driver raises: it is reported, not hidden
        raise UserError(
            f"storage '{redacted(url)}' does not open ({root_cause(error)}); write sqlite:///FILE, "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or leave it out to keep the study in memory"
        ) from None
    if name in there and there[name].user_attrs.get(OWNER) not in (token or "nobody", None):
        raise UserError(
            f"storage '{redacted(url)}' holds another study named '{name}'; name yours otherwise with --study, or "
            f"remove that one: optuna delete-study --study-name {name} --storage URL"
        )
    return storage


@dataclass(frozen=True)
class TrialRecord:
    """A trial that an Optuna study is to know of."""

    label: str  # study and number
    point: dict[str, Any]
    state: TrialState
    values: list[float] | None  # an entry an objective, of COMPLETE trials
    intermediate: dict[int, float]  # epoch -> objective; one objective only
    notes: dict[str, Any] = field(default_factory=dict)  # Optuna's system attributes


def sync_trials(
    study: optuna.Study,
    distributions: dict[str, optuna.distributions.BaseDistribution],
    known: Sequence[TrialRecord],
    token: str,
) -> dict[str, optuna.Trial]:
    """Bring a study in line with what is known; returns the trials that are still to run, by label.

    Trials the storage has as running that nobody knows of were asked for just before a driver died: they have failed.
    """
    import optuna

    study.set_user_attr(OWNER, token)
    stored = {trial.user_attrs.get(LABEL, trial._trial_id): trial for trial in study.get_trials(deepcopy=False)}
    running: dict[str, optuna.Trial] = {}
    for one in {one.label: one for one in known}.values():
        there = stored.get(one.label)
        if one.state == "RUNNING":
            alive = there is not None and not there.state.is_finished()
            running[one.label] = (
                optuna.Trial(study, there._trial_id) if there and alive else _asked(study, one, distributions)
            )
        elif there is None:
            study.add_trial(_frozen(one, distributions))
        elif not there.state.is_finished():
            study.tell(there.number, one.values, _state(one.state))
    labels = {one.label for one in known}
    for label, trial in stored.items():
        if label not in labels and trial.state == optuna.trial.TrialState.RUNNING:
            fail_trial(study, trial.number)
    return running


def fail_trial(study: optuna.Study, trial: optuna.Trial | int) -> None:
    """End a trial, or the one of this number in Optuna, that nobody trains."""
    study.tell(trial, state=_state("FAILED"))


def storage_errors() -> tuple[type[Exception], ...]:
    """What a storage raises whose database is away."""
    import optuna

    return (optuna.exceptions.StorageInternalError,)


def sampler_attributes(study: optuna.Study, trial: optuna.Trial) -> dict[str, Any]:
    """What the sampler wrote on a trial, which it may want to read in a later one."""
    return dict(study._storage.get_trial(trial._trial_id).system_attrs)


def enqueue(study: optuna.Study, point: Mapping[str, Any]) -> None:
    """Let the next trial asked for be at this point, also if a driver died between enqueueing and asking."""
    import optuna

    if not study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING]):
        study.enqueue_trial(dict(point))


def finish_trial(study: optuna.Study, trial: optuna.Trial, known: TrialRecord) -> None:
    """How a trial ended. A stopped one keeps the value it had last, if there is one objective."""
    for epoch, value in known.intermediate.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # epochs reported before
            trial.report(value, epoch)
    study.tell(trial, known.values, _state(known.state))


def _asked(
    study: optuna.Study, one: TrialRecord, distributions: dict[str, optuna.distributions.BaseDistribution]
) -> optuna.Trial:
    enqueue(study, one.point)
    trial = study.ask(fixed_distributions=distributions)
    trial.set_user_attr(LABEL, one.label)
    return trial


def _frozen(
    one: TrialRecord, distributions: dict[str, optuna.distributions.BaseDistribution]
) -> optuna.trial.FrozenTrial:
    import optuna

    pruned_value = list(one.intermediate.values())[-1:] if one.state == "STOPPED" else []
    return optuna.trial.create_trial(
        state=_state(one.state),
        params=one.point,
        distributions=distributions,
        values=one.values or pruned_value or None,
        intermediate_values=one.intermediate,
        user_attrs={LABEL: one.label},
        system_attrs=one.notes,
    )


def _state(state: TrialState) -> optuna.trial.TrialState:
    import optuna

    return {
        "COMPLETE": optuna.trial.TrialState.COMPLETE,
        "STOPPED": optuna.trial.TrialState.PRUNED,
        "FAILED": optuna.trial.TrialState.FAIL,
    }[state]
