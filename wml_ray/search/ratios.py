"""The domain of increasing pruning ratios."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Increasing:
    """The domain of all increasing lists of numbers in [lower, upper], one number a peer."""

    lower: float
    upper: float


def increasing(lower: float, upper: float) -> Increasing:
    """A domain for `pruning.ratios`: every family of ratios once, rather than in each of its M! orders.

    The sampler sees M independent numbers u in [0, 1], and the ratios are built from the largest down as order
    statistics: r_M = lower + (upper - lower) u_M^(1/M), then r_k = lower + (r_k+1 - lower) u_k^(1/k). Uniform u give
    uniform increasing lists.
    """
    return Increasing(lower, upper)


def from_uniform(steps: list[float], domain: Increasing) -> list[float]:
    ratios: list[float] = []
    above = domain.upper
    for count in range(len(steps), 0, -1):
        above = domain.lower + (above - domain.lower) * steps[count - 1] ** (1 / count)
        ratios.insert(0, round(above, 4))
    return ratios


def to_uniform(ratios: list[float], domain: Increasing) -> list[float]:
    """The inverse of `_from_uniform`; what is out of range or order comes out outside [0, 1]."""
    uppers = [*ratios[1:], domain.upper]
    steps = []
    for count, (ratio, upper) in enumerate(zip(ratios, uppers, strict=True), start=1):
        share = (
            (ratio - domain.lower) / (upper - domain.lower) if upper > domain.lower else float(ratio != domain.lower)
        )
        steps.append(share**count if share >= 0 else -1.0)
    return steps
