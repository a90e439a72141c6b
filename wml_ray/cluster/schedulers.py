"""Ray Tune's schedulers, for studies that are continued: they remember earlier trials, and judge no trial twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space, check_stop_metric
from wml_ray.search.study import Study


def make_scheduler(settings: SearchConfig, space: Space, stopped: set[str]) -> TrialScheduler:
    """A scheduler that adds the trials it stops to `stopped`."""
    mode = check_stop_metric(settings, space)
    metric, budget = settings.stop_metric, space.base.optim.epochs
    grace = settings.grace(budget)
    if settings.scheduler == "asha":
        scheduler: Any = _Asha(
            "epoch", metric, mode, max_t=budget, grace_period=grace, reduction_factor=settings.reduction_factor
        )
    elif settings.scheduler == "median":  # min_time_slice: it shall stop, never pause
        scheduler = _Median("epoch", metric, mode, grace_period=grace, min_time_slice=float("inf"))
    else:
        return FIFOScheduler()
    scheduler.stopped = stopped
    return scheduler


class _Asha(AsyncHyperBandScheduler):  # type: ignore[misc]  # Ray is not typed
    """ASHA that takes note of an interrupted trial's past without judging it again by those that came after it."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.CONTINUE or result.get("past"):
            return str(TrialScheduler.CONTINUE)
        self.stopped.add(trial.trial_id)
        return decision


class _Median(MedianStoppingRule):  # type: ignore[misc]  # Ray is not typed
    """Median stopping with the same mercy."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("past"):
            self._results[trial].append(result)
            return str(TrialScheduler.CONTINUE)
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision


@dataclass(frozen=True)
class EarlierTrial:
    """An earlier trial, as far as a scheduler looks at it."""

    trial_id: str


def replay(scheduler: TrialScheduler, sweep: Study) -> None:
    """Let a new scheduler see what earlier trials reached, so that a continued study is as strict as before."""
    for trial in sweep.trials.values():
        if trial.state == "RUNNING" or not trial.history:
            continue
        seen = EarlierTrial(f"earlier-{trial.number}")
        results = [{"epoch": entry["epoch"], "past": True, **entry["metrics"]} for entry in trial.history]
        scheduler.on_trial_add(None, seen)
        for result in results:
            scheduler.on_trial_result(None, seen, result)
        scheduler.on_trial_complete(None, seen, results[-1])
