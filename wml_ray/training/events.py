"""What a training reports while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepProgress:
    """Progress inside an epoch: training steps done of all there are."""

    epoch: int
    step: int
    total_steps: int
    loss: float


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is done: its number from 1, and its metrics under their MLflow names."""

    epoch: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class MidEpochState:
    """So many epochs and steps of the next one are done, and the machine may soon be gone: time for a checkpoint."""

    epoch: int
    step: int


OnEvent = Callable[[StepProgress | EpochEnd], None]
Preempted = Callable[
    [], bool
]  # whether the machine may soon be gone; asked on all workers at once, all are told the same

LogMetrics = Callable[[int, Mapping[str, float], int], None]  # step, metrics, milliseconds since the epoch of Unix


def ignore_metrics(step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
    """A `Log` for those who do not listen."""


def now_ms() -> int:
    """Milliseconds since the epoch of Unix, as MLflow counts."""
    return time.time_ns() // 1_000_000
