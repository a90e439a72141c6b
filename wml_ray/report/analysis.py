"""A sweep and what Optuna makes of it: the Pareto front, importances, histories. The only file that imports Optuna."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from wml_ray.tracking.results import StudyRecords

if TYPE_CHECKING:
    import numpy as np
    import optuna
    import pandas as pd


IMPORTANCE_TRIALS = 4
"""Fewer trials of the full budget say nothing about importance."""


def comparable_trials(study: StudyRecords) -> pd.DataFrame:
    """The trials that can be compared: of the full budget, with a finite value of every objective."""
    import numpy as np

    finite = np.isfinite(study.trials[list(study.objectives)].to_numpy(float)).all(axis=1)
    trials: pd.DataFrame = study.trials.loc[(study.trials["state"] == "COMPLETE") & finite]
    return trials


def pareto_front(study: StudyRecords) -> list[int]:
    """Numbers of the trials on the Pareto front, best by the first objective first.

    With one objective this is the best trial alone, the earliest of equals. Trials that were stopped or failed are
    never on it: what they reached in fewer epochs does not compare.
    """
    numbers = [int(number) for number in comparable_trials(study)["trial"]]
    on_front = {numbers[trial.number] for trial in _rebuilt(study, comparable_trials(study)).best_trials}
    ranked = [number for number in _ranked(study) if number in on_front]
    return ranked if len(study.objectives) > 1 else ranked[:1]


def best_trial_numbers(study: StudyRecords, limit: int) -> list[int]:
    """Up to `limit` trials to look at: of one objective the best ones, of several the front, evenly along it."""
    if len(study.objectives) == 1:
        return _ranked(study)[:limit]
    numbers = pareto_front(study)
    if len(numbers) <= limit:
        return numbers
    return [numbers[round(index * (len(numbers) - 1) / max(limit - 1, 1))] for index in range(limit)]


def importances(study: StudyRecords) -> dict[str, dict[str, float]]:
    """Objective -> searched key -> importance by fANOVA, the largest first; those of an objective sum to 1.

    Searched on a log scale, a key counts on that scale. An objective has no entries when there are fewer than
    `IMPORTANCE_TRIALS` trials to compare, or it or all keys are the same in all of them.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    trials = comparable_trials(study).dropna(subset=list(study.searched))
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


def best_so_far(study: StudyRecords, objective: str) -> list[tuple[int, float]]:
    """Trial number and the best value of the objective up to it, over the trials that can be compared."""
    trials = comparable_trials(study)
    running = trials[objective].astype(float)
    running = running.cummax() if study.objectives[objective] == "max" else running.cummin()
    return [(int(number), float(value)) for number, value in zip(trials["trial"], running, strict=True)]


def hypervolume(study: StudyRecords) -> list[tuple[int, float]]:
    """Trial number and the hypervolume of the trials up to it, over the trials that can be compared.

    The reference point is the worst value of each objective among them, so a lone trial has none.
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


def _ranked(study: StudyRecords) -> list[int]:
    """Numbers of the trials that can be compared, best by the first objective first, then the earliest."""
    objective, direction = next(iter(study.objectives.items()))
    trials = comparable_trials(study).sort_values(objective, ascending=direction == "min", kind="stable")
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


def _rebuilt(study: StudyRecords, trials: pd.DataFrame, parameters: dict[str, Parameter] | None = None) -> optuna.Study:
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
