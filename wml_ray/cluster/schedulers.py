"""Ray Tune's schedulers for continued studies: they include earlier trials and ignore results of a replay."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space, check_stop_metric
from wml_ray.search.study import RunningStudy

GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly, whichever trials are taken


def make_scheduler(settings: SearchConfig, space: Space, stopped: set[str]) -> TrialScheduler:
    """A scheduler that adds the ids of the trials it stops to `stopped`."""
    mode = check_stop_metric(settings, space)
    metric, budget = settings.stop_metric, space.base.optim.epochs
    grace = settings.grace(budget)
    if settings.scheduler in ("asha", "hyperband"):
        factor = settings.reduction_factor
        rungs = len(list(takewhile(lambda rung: rung < budget, (grace * factor**k for k in count()))))
        kind, brackets = (_Asha, 1) if settings.scheduler == "asha" else (_HyperBand, rungs + 1)
        rules = {"max_t": budget, "grace_period": grace, "reduction_factor": factor, "brackets": brackets}
        scheduler: Any = kind("epoch", metric, mode, **rules)
    elif settings.scheduler == "median":  # an infinite time slice, so that it never pauses a trial
        scheduler = _Median("epoch", metric, mode, grace_period=grace, min_time_slice=float("inf"))
    else:
        return FIFOScheduler()
    scheduler.stopped = stopped
    return scheduler


def replay(scheduler: TrialScheduler, study: RunningStudy) -> None:
    """Report the results of ended trials to a new scheduler, so that a continued study stops trials as before."""
    for trial in study.trials.values():
        if trial.state == "RUNNING" or not trial.history:
            continue
        earlier = EarlierTrial(f"earlier-{trial.number}", trial.number)
        results = [{"epoch": entry["epoch"], "past": True, **entry["metrics"]} for entry in trial.history]
        scheduler.on_trial_add(None, earlier)
        for result in results:
            scheduler.on_trial_result(None, earlier, result)
        scheduler.on_trial_complete(None, earlier, results[-1])


@dataclass(frozen=True)
class EarlierTrial:
    """Stands for a trial of an earlier start; schedulers use only its id and its number."""

    trial_id: str
    number: int

    @property
    def config(self) -> dict[str, int]:
        """The part of `StudySearcher.suggest` that schedulers use."""
        return {"trial": self.number}


class _Asha(AsyncHyperBandScheduler):  # type: ignore[misc]  # Ray is not typed
    """ASHA that records results replayed after a restart but does not stop trials for them."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.CONTINUE or result.get("past"):
            return str(TrialScheduler.CONTINUE)
        self.stopped.add(trial.trial_id)
        return decision


class _HyperBand(_Asha):
    """Asynchronous HyperBand (Li et al., 2020): ASHA in several brackets, of which each starts one rung later.

    The last bracket stops no trial. Ray Tune's synchronous HyperBandScheduler pauses trials until all of their bracket
    have arrived at a rung. Paused trials occupy the searcher, so a bracket would be no larger than the cluster.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Choose the bracket by the trial's number: an interrupted trial returns to its own.

        The brackets get the shares of trials of HyperBand (Li et al., 2017, algorithm 1), about one budget each.
        """
        last = len(self._brackets) - 1
        shares = [self._reduction_factor ** (last - bracket) / (last - bracket + 1) for bracket in range(last + 1)]
        position, bracket = trial.config["trial"] * GOLDEN % 1 * sum(shares), 0
        while position >= shares[bracket] and bracket < last:
            position, bracket = position - shares[bracket], bracket + 1
        self._trial_info[trial.trial_id] = self._brackets[bracket]


class _Median(MedianStoppingRule):  # type: ignore[misc]  # Ray is not typed
    """Median stopping that records results replayed after a restart but does not stop trials for them."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("past"):
            self._results[trial].append(result)
            return str(TrialScheduler.CONTINUE)
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision
