"""TPE for studies of any length: it learns from a bounded number of ended trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

LEARNED_TRIALS = 400  # a suggestion from 10,000 would take 200 ms
BEST_TRIALS = 40  # at least the good group of TPE: a tenth of the trials, and of one objective at most 25
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
NAME = "excerpt"  # of the study in memory


class BoundedTPE(optuna.samplers.TPESampler):
    """TPE that learns from an excerpt of the study once it has more than `LEARNED_TRIALS` ended trials.

    The excerpt grows with the study. When it is full it keeps the best trials and every second of the others, so the
    best are always in it, and of the others more recent ones than old ones. Running trials are not in it: from then on
    `constant_liar` has no effect.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # constant_liar would write to the trial that is asked for, which the excerpt does not have
        self._excerpt_sampler = optuna.samplers.TPESampler(**{**settings, "constant_liar": False})
        self._excerpt: list[FrozenTrial] = []
        self._seen: set[int] = set()  # numbers of the study's trials that are in the excerpt, or were
        self._storage = optuna.storages.InMemoryStorage()  # of a study with the trials of the excerpt

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE, from the excerpt."""
        if learned := self._excerpt_of(study):
            return self._excerpt_sampler.sample_relative(learned, trial, search_space)
        return super().sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE, from the excerpt."""
        if learned := self._excerpt_of(study):
            return self._excerpt_sampler.sample_independent(learned, trial, param_name, param_distribution)
        return super().sample_independent(study, trial, param_name, param_distribution)

    def _excerpt_of(self, study: optuna.Study) -> optuna.Study | None:
        ended = study.get_trials(deepcopy=False, states=ENDED)
        if len(ended) <= LEARNED_TRIALS:
            return None
        added = [trial for trial in ended if trial.number not in self._seen]
        self._seen.update(trial.number for trial in added)
        made_anew = not self._excerpt
        for trial in added:
            self._excerpt.append(trial)
            if len(self._excerpt) == LEARNED_TRIALS:
                self._excerpt, made_anew = thinned(self._excerpt, study.directions), True
        if made_anew:
            self._storage = optuna.storages.InMemoryStorage()
            optuna.create_study(
                study_name=NAME, storage=self._storage, sampler=self._excerpt_sampler, directions=study.directions
            )
        # A handle for each call: it keeps the trials that it has once read, until it is asked or told itself.
        handle = optuna.load_study(study_name=NAME, storage=self._storage, sampler=self._excerpt_sampler)
        handle.add_trials(self._excerpt if made_anew else added)
        return handle


def thinned(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """The `BEST_TRIALS` best of the ended trials and every second of the others, the last included, in their order.

    Complete trials come before stopped ones. With several objectives those are better that fewer trials dominate. A
    stopped trial is better the longer it trained, then, with one objective, by its last value.
    """
    signs = np.array([1.0 if direction == StudyDirection.MINIMIZE else -1.0 for direction in directions])
    best = sorted(range(len(trials)), key=_ranks(trials, signs).__getitem__)[:BEST_TRIALS]
    others = sorted(set(range(len(trials))) - set(best))
    return [trials[index] for index in sorted([*best, *others[::-2]])]


def _ranks(trials: Sequence[FrozenTrial], signs: np.ndarray[Any, np.dtype[np.float64]]) -> list[tuple[float, ...]]:
    """A tuple for each trial, smaller where it is better."""
    complete = [trial.values for trial in trials if trial.state == TrialState.COMPLETE]
    losses_ND = np.array(complete).reshape(-1, len(signs)) * signs
    not_worse_NN = (losses_ND[:, None] <= losses_ND).all(-1)
    dominators = iter((not_worse_NN & ~not_worse_NN.T).sum(0).tolist())  # of one objective: how many trials are better
    return [
        (0.0, next(dominators)) if trial.state == TrialState.COMPLETE else _stopped_rank(trial, signs)
        for trial in trials
    ]


def _stopped_rank(trial: FrozenTrial, signs: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, ...]:
    if not trial.intermediate_values:
        return (2.0,)
    last = max(trial.intermediate_values)
    return (1.0, -last, float(signs[0]) * trial.intermediate_values[last])
