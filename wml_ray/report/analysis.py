"""A sweep and what Optuna makes of it: the Pareto front, importances, histories. The only file that imports Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from wml_ray.config import UserError
from wml_ray.delivery import first_cause
from wml_ray.tracking import shown

if TYPE_CHECKING:
    import numpy as np
    import optuna
    import pandas as pd

State = Literal["COMPLETE", "STOPPED", "FAILED", "RUNNING"]
"""COMPLETE has had the full budget of epochs, STOPPED was stopped before it by the scheduler."""

LABEL = "wml_ray.trial"  # user attribute of Optuna's trials: study and number
OWNER = "wml_ray.token"  # user attribute of Optuna's studies: whose it is
STARTUP_TRIALS = 5  # drawn at random before TPE: half of Optuna's, for here a trial is a training
LIAR_TRIALS = 200  # up to so many trials, TPE looks at those that still run
IMPORTANCE_TRIALS = 4
"""Fewer trials of the full budget say nothing about importance."""


@dataclass(frozen=True)
class Study:
    """A sweep as MLflow has it."""

    name: str
    objectives: dict[str, str]
    """MLflow metric -> "max" or "min", in the order given; at least one."""
    searched: dict[str, str]
    """Config key -> "linear", "log" or "choice"."""
    settings: dict[str, str]
    """Sampler, scheduler and the like, to be shown as they are."""
    trials: pd.DataFrame
    """A row a trial, by number: `trial`, `state`, `epochs`, `reason`, the searched keys, every metric under its MLflow
    name (NaN where absent), and `peers`, a list of dicts with the keys `peer`, `macs`, `params`, `val`, `test` and
    `weight` (empty unless COMPLETE)."""


def complete(study: Study) -> pd.DataFrame:
    """The trials that can be compared: of the full budget, with a finite value of every objective."""
    import numpy as np

    finite = np.isfinite(study.trials[list(study.objectives)].to_numpy(float)).all(axis=1)
    trials: pd.DataFrame = study.trials.loc[(study.trials["state"] == "COMPLETE") & finite]
    return trials


def front(study: Study) -> list[int]:
    """Numbers of the trials on the Pareto front, best by the first objective first.

    With one objective this is the best trial alone, the earliest of equals. Trials that were stopped or failed are
    never on it: what they reached in fewer epochs does not compare.
    """
    numbers = [int(number) for number in complete(study)["trial"]]
    on_front = {numbers[trial.number] for trial in _rebuilt(study, complete(study)).best_trials}
    ranked = [number for number in _ranked(study) if number in on_front]
    return ranked if len(study.objectives) > 1 else ranked[:1]


def best(study: Study, limit: int) -> list[int]:
    """Up to `limit` trials to look at: of one objective the best ones, of several the front, evenly along it."""
    if len(study.objectives) == 1:
        return _ranked(study)[:limit]
    numbers = front(study)
    if len(numbers) <= limit:
        return numbers
    return [numbers[round(index * (len(numbers) - 1) / max(limit - 1, 1))] for index in range(limit)]


def importances(study: Study) -> dict[str, dict[str, float]]:
    """Objective -> searched key -> importance by fANOVA, the largest first; those of an objective sum to 1.

    Searched on a log scale, a key counts on that scale. An objective has no entries when there are fewer than
    `IMPORTANCE_TRIALS` trials to compare, or it or all keys are the same in all of them.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    trials = complete(study).dropna(subset=list(study.searched))
    parameters = {key: _parameter(trials[key], scale) for key, scale in study.searched.items()}
    rebuilt = _rebuilt(study, trials, parameters)
    enough = len(trials) >= IMPORTANCE_TRIALS and not all(space.single() for space, _ in parameters.values())
    found: dict[str, dict[str, float]] = {objective: {} for objective in study.objectives}
    for index, objective in enumerate(study.objectives):
        if enough and trials[objective].nunique() > 1:
            target = partial(_value, index=index)
            forest = FanovaImportanceEvaluator(seed=0)
            with suppress(RuntimeError):  # values so close that no tree splits them
                shares = get_param_importances(rebuilt, evaluator=forest, target=target)
                found[objective] = {key: float(share) for key, share in shares.items()}
    return found


def history(study: Study, objective: str) -> list[tuple[int, float]]:
    """Trial number and the best value of the objective up to it, over the trials that can be compared."""
    trials = complete(study)
    running = trials[objective].astype(float)
    running = running.cummax() if study.objectives[objective] == "max" else running.cummin()
    return [(int(number), float(value)) for number, value in zip(trials["trial"], running, strict=True)]


def hypervolume(study: Study) -> list[tuple[int, float]]:
    """Trial number and the hypervolume of the trials up to it, over the trials that can be compared.

    The reference point is the worst value of each objective among them, so a lone trial has none.
    """
    import numpy as np

    trials = complete(study)
    if trials.empty:
        return []
    signs = [1.0 if direction == "max" else -1.0 for direction in study.objectives.values()]
    gains = trials[list(study.objectives)].to_numpy(float) * signs
    gains -= gains.min(axis=0)
    kept, volumes = np.empty((0, len(signs))), [0.0]
    for gain in gains:
        volumes.append(max(volumes[-1], dominated_volume(grown := np.vstack([kept, gain]))))
        if volumes[-1] > volumes[-2]:  # the others add nothing later either, and cost time
            kept = grown
    return [(int(number), volume) for number, volume in zip(trials["trial"], volumes[1:], strict=True)]


def dominated_volume(gains: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Volume of the union of the boxes from 0 to each row of `gains`, by slicing; Optuna's own is private."""
    import numpy as np

    if gains.shape[1] == 1:
        return float(gains.max())
    gains = gains[np.argsort(-gains[:, 0])]
    depths = gains[:, 0] - np.append(gains[1:, 0], 0.0)
    if gains.shape[1] == 2:
        return float(depths @ np.maximum.accumulate(gains[:, 1]))
    slices = (depth * dominated_volume(gains[: end + 1, 1:]) for end, depth in enumerate(depths) if depth > 0)
    return float(sum(slices))


def _value(trial: optuna.trial.FrozenTrial, index: int) -> float:
    return float(trial.values[index])


def _ranked(study: Study) -> list[int]:
    """Numbers of the trials that can be compared, best by the first objective first, then the earliest."""
    objective, direction = next(iter(study.objectives.items()))
    trials = complete(study).sort_values(objective, ascending=direction == "min", kind="stable")
    return [int(number) for number in trials["trial"]]


Parameter = tuple["optuna.distributions.BaseDistribution", list[Any]]


def _parameter(values: pd.Series[Any], scale: str) -> Parameter:
    """A searched key for Optuna: the space its values span, and the values in it."""
    import numpy as np
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if scale == "choice":
        choices = [str(value) for value in values]
        return CategoricalDistribution(sorted(set(choices)) or [""]), choices
    numbers = values.to_numpy(float)
    # The logarithm is taken here because fANOVA measures the space as it is written.
    numbers = np.log10(numbers) if scale == "log" else numbers
    low, high = (numbers.min(), numbers.max()) if len(numbers) else (0.0, 0.0)
    return FloatDistribution(float(low), float(high)), numbers.tolist()


def _rebuilt(study: Study, trials: pd.DataFrame, parameters: dict[str, Parameter] | None = None) -> optuna.Study:
    """These trials as a study in Optuna's memory, numbered from 0."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
    rebuilt = optuna.create_study(directions=[directions[direction] for direction in study.objectives.values()])
    for row, values in enumerate(trials[list(study.objectives)].to_numpy(float).tolist()):
        params = {key: column[row] for key, (_, column) in (parameters or {}).items()}
        spaces = {key: space for key, (space, _) in (parameters or {}).items()}
        rebuilt.add_trial(optuna.trial.create_trial(values=values, params=params, distributions=spaces))
    return rebuilt


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
            f"storage '{shown(url)}' does not open ({first_cause(error)}); write sqlite:///FILE, "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or leave it out to keep the study in memory"
        ) from None
    if name in there and there[name].user_attrs.get(OWNER) not in (token or "nobody", None):
        raise UserError(
            f"storage '{shown(url)}' holds another study named '{name}'; name yours otherwise with --study, or remove "
            f"that one: optuna delete-study --study-name {name} --storage URL"
        )
    return storage


@dataclass(frozen=True)
class Known:
    """A trial that an Optuna study is to know of."""

    label: str  # study and number
    point: dict[str, Any]
    state: State
    values: list[float] | None  # an entry an objective, of COMPLETE trials
    intermediate: dict[int, float]  # epoch -> objective; one objective only
    notes: dict[str, Any] = field(default_factory=dict)  # Optuna's system attributes


def remember(
    study: optuna.Study,
    distributions: dict[str, optuna.distributions.BaseDistribution],
    known: Sequence[Known],
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
            fail(study, trial.number)
    return running


def fail(study: optuna.Study, trial: optuna.Trial | int) -> None:
    """End a trial, or the one of this number in Optuna, that nobody trains."""
    study.tell(trial, state=_state("FAILED"))


def storage_errors() -> tuple[type[Exception], ...]:
    """What a storage raises whose database is away."""
    import optuna

    return (optuna.exceptions.StorageInternalError,)


def notes_of(study: optuna.Study, trial: optuna.Trial) -> dict[str, Any]:
    """What the sampler wrote on a trial, which it may want to read in a later one."""
    return dict(study._storage.get_trial(trial._trial_id).system_attrs)


def enqueue(study: optuna.Study, point: Mapping[str, Any]) -> None:
    """Let the next trial asked for be at this point, also if a driver died between enqueueing and asking."""
    import optuna

    if not study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.WAITING]):
        study.enqueue_trial(dict(point))


def tell(study: optuna.Study, trial: optuna.Trial, known: Known) -> None:
    """How a trial ended. A stopped one keeps the value it had last, if there is one objective."""
    for epoch, value in known.intermediate.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # epochs reported before
            trial.report(value, epoch)
    study.tell(trial, known.values, _state(known.state))


def _asked(
    study: optuna.Study, one: Known, distributions: dict[str, optuna.distributions.BaseDistribution]
) -> optuna.Trial:
    enqueue(study, one.point)
    trial = study.ask(fixed_distributions=distributions)
    trial.set_user_attr(LABEL, one.label)
    return trial


def _frozen(one: Known, distributions: dict[str, optuna.distributions.BaseDistribution]) -> optuna.trial.FrozenTrial:
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


def _state(state: State) -> optuna.trial.TrialState:
    import optuna

    return {
        "COMPLETE": optuna.trial.TrialState.COMPLETE,
        "STOPPED": optuna.trial.TrialState.PRUNED,
        "FAILED": optuna.trial.TrialState.FAIL,
    }[state]
