"""Events and metrics that a training reports while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepProgress:
    """Training steps done, of all steps of the run."""

    epoch: int
    step: int
    total_steps: int
    loss: float


@dataclass(frozen=True)
class EpochEnd:
    """The number of a finished epoch, from 1, and its metrics under their MLflow names."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class MidEpochState:
    """Epochs done, and steps done of the next one, at a checkpoint in the middle of an epoch."""

    epoch: int
    step: int


OnEvent = Callable[[StepProgress | EpochEnd], None]
Preempted = Callable[[], bool]
"""True when the machine is about to stop. Called on all workers at the same step; returns the same on all."""

LogMetrics = Callable[[int, Mapping[str, float], int], None]
"""Receives step, metrics by name, and milliseconds since the Unix epoch."""


def now_ms() -> int:
    """Milliseconds since the Unix epoch, as MLflow counts."""
    return time.time_ns() // 1_000_000
