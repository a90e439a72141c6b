"""TPE for studies of any length: it learns from a bounded number of ended trials."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

LEARNED_TRIALS = 1000  # a suggestion from so many takes 10 ms, from 10,000 it would take 200
BEST_TRIALS = 50  # of one objective; TPE's good group has at most 25
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class BoundedTPE(optuna.samplers.TPESampler):
    """TPE that learns from an excerpt of the study once it has more than `LEARNED_TRIALS` ended trials.

    The excerpt grows with the study. When it is full it keeps the best trials and every second of the others, so the
    best are always in it, and of the others more recent ones than old ones.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # constant_liar would write to the trial that is asked for, which the excerpt does not have
        self._of_excerpt = optuna.samplers.TPESampler(**{**settings, "constant_liar": False})
        self._excerpt: optuna.Study | None = None
        self._seen: set[int] = set()  # numbers of the study's trials that are in the excerpt, or were

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE, from the excerpt."""
        if excerpt := self._excerpt_of(study):
            return self._of_excerpt.sample_relative(excerpt, trial, search_space)
        return super().sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE, from the excerpt."""
        if excerpt := self._excerpt_of(study):
            return self._of_excerpt.sample_independent(excerpt, trial, param_name, param_distribution)
        return super().sample_independent(study, trial, param_name, param_distribution)

    def _excerpt_of(self, study: optuna.Study) -> optuna.Study | None:
        ended = study.get_trials(deepcopy=False, states=ENDED)
        if len(ended) <= LEARNED_TRIALS:
            return None
        excerpt = self._excerpt or _empty_copy(study)
        for trial in ended:
            if trial.number not in self._seen:
                self._seen.add(trial.number)
                excerpt.add_trial(trial)
                if len(excerpt.get_trials(deepcopy=False)) == LEARNED_TRIALS:
                    excerpt = thinned(excerpt)
        self._excerpt = excerpt
        return excerpt


def thinned(study: optuna.Study) -> optuna.Study:
    """A study in memory of the best trials of `study` and every second of the others, the last of them included.

    The best are `BEST_TRIALS` with one objective, and the Pareto front with several.
    """
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(study.directions) > 1:
        best = study.best_trials
    else:
        highest_first = study.direction == optuna.study.StudyDirection.MAXIMIZE
        best = sorted(complete, key=lambda trial: trial.values[0], reverse=highest_first)[:BEST_TRIALS]
    kept = {trial.number for trial in best}
    others = [trial.number for trial in trials if trial.number not in kept]
    kept.update(others[::-2])
    copy = _empty_copy(study)
    copy.add_trials(trial for trial in trials if trial.number in kept)
    return copy


def _empty_copy(study: optuna.Study) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler()  # never asked
    return optuna.create_study(directions=study.directions, sampler=sampler)
