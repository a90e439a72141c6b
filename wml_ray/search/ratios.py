"""The domain of increasing pruning ratios."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Increasing:
    """The domain of all increasing lists of numbers in [lower, upper], one number for each peer."""

    lower: float
    upper: float


def increasing(lower: float, upper: float) -> Increasing:
    """A domain for `pruning.ratios` that contains each family of ratios once instead of in each of its M! orders.

    The sampler has M independent parameters u in [0, 1]. The ratios are order statistics of them, built from the
    largest down: r_M = lower + (upper - lower) u_M^(1/M), then r_k = lower + (r_k+1 - lower) u_k^(1/k). Uniform u give
    uniform increasing lists.
    """
    return Increasing(lower, upper)


def from_uniform(shares: list[float], domain: Increasing) -> list[float]:
    """Increasing ratios, rounded to four digits, from M numbers in [0, 1]."""
    ratios: list[float] = []
    above = domain.upper
    for count in range(len(shares), 0, -1):
        above = domain.lower + (above - domain.lower) * shares[count - 1] ** (1 / count)
        ratios.insert(0, round(above, 4))
    return ratios


def to_uniform(ratios: list[float], domain: Increasing) -> list[float]:
    """The inverse of `from_uniform`. Ratios outside the bounds or not in order give numbers outside [0, 1]."""
    uppers = [*ratios[1:], domain.upper]
    shares = []
    for count, (ratio, upper) in enumerate(zip(ratios, uppers, strict=True), start=1):
        share = (
            (ratio - domain.lower) / (upper - domain.lower) if upper > domain.lower else float(ratio != domain.lower)
        )
        shares.append(share**count if share >= 0 else -1.0)
    return shares
