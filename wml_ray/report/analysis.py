"""Analysis of a study with Optuna: the Pareto front, importances and histories."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from wml_ray.tracking.results import StudyRecords

if TYPE_CHECKING:
    import numpy as np
    import optuna
    import pandas as pd


IMPORTANCE_TRIALS = 4
"""Importances need at least so many trials of the full budget."""
MOST_IMPORTANCE_TRIALS = 200
"""The time of fANOVA grows faster than the trials: 3 s of CPU for 250 of them, 33 s for 1,000."""


def comparable_trials(study: StudyRecords) -> pd.DataFrame:
    """The trials that trained for the full budget and have a finite value of every objective."""
    import numpy as np

    finite = np.isfinite(study.trials[list(study.objectives)].to_numpy(float)).all(axis=1)
    trials: pd.DataFrame = study.trials.loc[(study.trials["state"] == "COMPLETE") & finite]
    return trials


def pareto_front(study: StudyRecords) -> list[int]:
    """Numbers of the trials on the Pareto front, the best first objective first.

    With one objective this is the best trial alone, the earliest of equals. Trials that were stopped or failed are
    never on it: values after fewer epochs cannot be compared.
    """
    return list(_front(study))


@lru_cache(maxsize=1)  # a report asks many times, and a front of 10,000 trials takes half a second
def _front(study: StudyRecords) -> tuple[int, ...]:
    trials = comparable_trials(study)
    numbers = [int(number) for number in trials["trial"]]
    on_front = {numbers[trial.number] for trial in _rebuilt(study, trials).best_trials}
    ranked = [number for number in _ranked(study) if number in on_front]
    return tuple(ranked if len(study.objectives) > 1 else ranked[:1])


def best_trial_numbers(study: StudyRecords, limit: int) -> list[int]:
    """Numbers of up to `limit` trials: the best ones for one objective, else trials spread evenly along the front."""
    if len(study.objectives) == 1:
        return _ranked(study)[:limit]
    numbers = pareto_front(study)
    return [numbers[index] for index in _spread(len(numbers), limit)]


def importances(study: StudyRecords) -> dict[str, dict[str, float]]:
    """Objective -> searched key -> importance by fANOVA, the largest first; those of an objective sum to 1.

    A key that is searched on a log scale is measured on that scale. An objective has no entries if there are fewer than
    `IMPORTANCE_TRIALS` trials to compare, or if the objective or all keys are constant. Of more than
    `MOST_IMPORTANCE_TRIALS` so many are taken, spread evenly over the study.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    trials = comparable_trials(study).dropna(subset=list(study.searched))
    trials = trials.iloc[_spread(len(trials), MOST_IMPORTANCE_TRIALS)]
    parameters = {key: _parameter(trials[key], scale) for key, scale in study.searched.items()}
    rebuilt = _rebuilt(study, trials, parameters)
    enough = len(trials) >= IMPORTANCE_TRIALS and not all(space.single() for space, _ in parameters.values())
    found: dict[str, dict[str, float]] = {objective: {} for objective in study.objectives}
    for index, objective in enumerate(study.objectives):
        if enough and trials[objective].nunique() > 1:
            target = partial(_value, index=index)
            forest = FanovaImportanceEvaluator(seed=0)
            with suppress(RuntimeError):  # the values are so close that no tree splits them
                shares = get_param_importances(rebuilt, evaluator=forest, target=target)
                found[objective] = {key: float(share) for key, share in shares.items()}
    return found


def best_so_far(study: StudyRecords, objective: str) -> list[tuple[int, float]]:
    """Trial numbers with the best value of the objective so far, over the comparable trials."""
    trials = comparable_trials(study)
    running = trials[objective].astype(float)
    running = running.cummax() if study.objectives[objective] == "max" else running.cummin()
    return [(int(number), float(value)) for number, value in zip(trials["trial"], running, strict=True)]


def hypervolume(study: StudyRecords) -> list[tuple[int, float]]:
    """Trial numbers with the hypervolume so far, over the comparable trials.

    The reference point is the worst value of each objective among them, so the volume of a single trial is 0.
    """
    import numpy as np

    trials = comparable_trials(study)
    if trials.empty:
        return []
    signs = [1.0 if direction == "max" else -1.0 for direction in study.objectives.values()]
    gains = trials[list(study.objectives)].to_numpy(float) * signs
    gains -= gains.min(axis=0)
    kept, volumes = np.empty((0, len(signs))), [0.0]
    for gain in gains:
        volumes.append(max(volumes[-1], dominated_volume(grown := np.vstack([kept, gain]))))
        if volumes[-1] > volumes[-2]:  # a dominated trial adds nothing later either
            kept = grown
    return [(int(number), volume) for number, volume in zip(trials["trial"], volumes[1:], strict=True)]


def dominated_volume(gains: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Volume of the union of the boxes from 0 to each row of `gains` (N, D), by slicing. Optuna's own is private."""
    import numpy as np

    if gains.shape[1] == 1:
        return float(gains.max())
    gains = gains[np.argsort(-gains[:, 0])]
    depths = gains[:, 0] - np.append(gains[1:, 0], 0.0)
    if gains.shape[1] == 2:
        return float(depths @ np.maximum.accumulate(gains[:, 1]))
    slices = (depth * dominated_volume(gains[: end + 1, 1:]) for end, depth in enumerate(depths) if depth > 0)
    return float(sum(slices))


def _spread(length: int, limit: int) -> list[int]:
    """Up to `limit` positions of a list, spread evenly from its first to its last."""
    if length <= limit:
        return list(range(length))
    return [round(index * (length - 1) / max(limit - 1, 1)) for index in range(limit)]


def _value(trial: optuna.trial.FrozenTrial, index: int) -> float:
    return float(trial.values[index])


def _ranked(study: StudyRecords) -> list[int]:
    """Numbers of the comparable trials, the best first objective first, then the earliest."""
    objective, direction = next(iter(study.objectives.items()))
    trials = comparable_trials(study).sort_values(objective, ascending=direction == "min", kind="stable")
    return [int(number) for number in trials["trial"]]


Parameter = tuple["optuna.distributions.BaseDistribution", list[Any]]


def _parameter(values: pd.Series[Any], scale: str) -> Parameter:
    """Optuna's distribution over the range of the values of a searched key, and the values."""
    import numpy as np
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if scale == "choice":
        choices = [str(value) for value in values]
        return CategoricalDistribution(sorted(set(choices)) or [""]), choices
    numbers = values.to_numpy(float)
    # fANOVA ignores a log scale of the distribution, so the logarithm is taken here.
    numbers = np.log10(numbers) if scale == "log" else numbers
    low, high = (numbers.min(), numbers.max()) if len(numbers) else (0.0, 0.0)
    return FloatDistribution(float(low), float(high)), numbers.tolist()


def _rebuilt(study: StudyRecords, trials: pd.DataFrame, parameters: dict[str, Parameter] | None = None) -> optuna.Study:
    """An in-memory Optuna study of these trials, numbered from 0."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = {"max": optuna.study.StudyDirection.MAXIMIZE, "min": optuna.study.StudyDirection.MINIMIZE}
    rebuilt = optuna.create_study(directions=[directions[direction] for direction in study.objectives.values()])
    for row, values in enumerate(trials[list(study.objectives)].to_numpy(float).tolist()):
        params = {key: column[row] for key, (_, column) in (parameters or {}).items()}
        spaces = {key: space for key, (space, _) in (parameters or {}).items()}
        rebuilt.add_trial(optuna.trial.create_trial(values=values, params=params, distributions=spaces))
    return rebuilt
