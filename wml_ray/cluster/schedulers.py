"""Ray Tune's schedulers for continued studies: they include earlier trials and ignore results of a replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space, check_stop_metric
from wml_ray.search.study import RunningStudy


def make_scheduler(settings: SearchConfig, space: Space, stopped: set[str]) -> TrialScheduler:
    """A scheduler that adds the ids of the trials it stops to `stopped`."""
    mode = check_stop_metric(settings, space)
    metric, budget = settings.stop_metric, space.base.optim.epochs
    grace = settings.grace(budget)
    if settings.scheduler == "asha":
        scheduler: Any = _Asha(
            "epoch", metric, mode, max_t=budget, grace_period=grace, reduction_factor=settings.reduction_factor
        )
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
        earlier = EarlierTrial(f"earlier-{trial.number}")
        results = [{"epoch": entry["epoch"], "past": True, **entry["metrics"]} for entry in trial.history]
        scheduler.on_trial_add(None, earlier)
        for result in results:
            scheduler.on_trial_result(None, earlier, result)
        scheduler.on_trial_complete(None, earlier, results[-1])


@dataclass(frozen=True)
class EarlierTrial:
    """Stands for a trial of an earlier start; schedulers use only its id."""

    trial_id: str


class _Asha(AsyncHyperBandScheduler):  # type: ignore[misc]  # Ray is not typed
    """ASHA that records results replayed after a restart but does not stop trials for them."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.CONTINUE or result.get("past"):
            return str(TrialScheduler.CONTINUE)
        self.stopped.add(trial.trial_id)
        return decision


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
