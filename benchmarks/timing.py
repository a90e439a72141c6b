"""Ratios on a noisy machine: candidates take turns, and the median of each is compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians_s(candidates: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds a call of each candidate, over `rounds` turns after one warm-up turn."""
    times_s: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            start_s = time.perf_counter()
            call()
            if turn:
                times_s[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(values) for name, values in times_s.items()}
