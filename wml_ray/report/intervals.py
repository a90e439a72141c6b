"""Intervals of accuracies."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` trials, by Wilson's score (1927); (0, 1) without trials."""
    if count == 0:
        return 0.0, 1.0
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
