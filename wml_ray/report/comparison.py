"""The numbers of a comparison: means over seeds with intervals, differences paired by seed, and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wml_ray.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

COST_REFERENCE = "independent"
"""The row that costs are relative to; the first row where there is none."""
SPLITS = ("test", "val")
COSTS = ("train/seconds", "train/peak_memory_bytes")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval, which is NaN for fewer than two seeds."""

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of the values and its 95 % interval by Student's t: t s / sqrt(n), s with n - 1 degrees of freedom."""
    from scipy.special import stdtrit

    count = len(values)
    mean = sum(values) / count if count else math.nan
    if count < 2:
        return Estimate(mean, math.nan, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, float(stdtrit(count - 1, 0.975)) * math.sqrt(variance / count), count)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """The mean difference of two rows and its interval, over the seeds that both have. Keys are seeds."""
    return estimate([value - reference[seed] for seed, value in values.items() if seed in reference])


def clear_best(estimates: Sequence[Estimate]) -> int | None:
    """Index of the highest mean, if its interval lies above the intervals of all others; else None."""
    if len(estimates) < 2 or any(math.isnan(one.half_width) for one in estimates):
        return None
    best = max(range(len(estimates)), key=lambda index: estimates[index].mean)
    others = [one.high for index, one in enumerate(estimates) if index != best]
    return best if estimates[best].low > max(others) else None


@dataclass(frozen=True)
class Row:
    """A row of a comparison: the finished runs of a method, or of a value of a key."""

    name: str
    seeds: list[int]
    accuracies: dict[str, Estimate]
    """By metric name; `test/accuracy/peers` is the mean of the peers."""
    differences: dict[str, Estimate]
    """To the first row, paired by seed."""
    costs: dict[str, Estimate]
    """By metric name, of `COSTS`."""
    relative_costs: dict[str, float]
    """Cost divided by that of the reference, NaN where a run lacks it."""
    macs: list[float]
    """Of each peer, mean over seeds."""
    tree_macs: float


def compared_rows(runs: pd.DataFrame, names: Sequence[str]) -> list[Row]:
    """The rows of a comparison in this order, those without a finished run left out.

    `runs` has a row for each finished run: `variant`, `seed`, `peers` and its metrics, see `StudyRecords.trials`.
    """
    groups = {name: runs[runs["variant"] == name] for name in names}
    groups = {name: group for name, group in groups.items() if len(group)}
    if not groups:
        return []
    metrics = {name: _metrics(group) for name, group in groups.items()}
    first = next(iter(metrics.values()))
    reference = metrics.get(COST_REFERENCE, first)
    return [_row(name, groups[name], own, first, reference) for name, own in metrics.items()]


def quantities(rows: Sequence[Row]) -> dict[str, str]:
    """Last part of the metric name of each column of accuracies -> its heading."""
    peers = {f"peer{index}": f"peer {index}" for index in range(max((len(row.macs) for row in rows), default=0))}
    return {
        **peers,
        "peers": "mean of\npeers",
        "ensemble_average": "average\nensemble",
        "method": "method's\nprediction",
    }


def group_runs(runs: pd.DataFrame, keys: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Finished runs with `variant`, the value of `keys` that they have, and an integer `seed`; and all variants.

    `runs` is that of `tracking.results.finished_runs`. Numbers ascend; the others are in the order of the alphabet.

    Raises:
        UserError: no run has such a key, two runs have the same seed, or the runs differ in another key too.
    """
    params = [name for name in runs.columns if "." in name and "/" not in name]
    grouped = [name for key in keys for name in _columns_of(params, key)]
    left_out = ["scale.", "run.", "data.root", "data.download", "data.loader_workers", "data.cache_"]
    if "teacher.run" in params and (runs.groupby("seed")["teacher.run"].nunique() <= 1).all():
        left_out += ["teacher.run", *(["teacher.peer"] if "method.name" in keys else [])]  # each seed has its teacher
    for name in params:
        values = runs[name].dropna().unique()
        ignored = name in grouped or (name.startswith(tuple(left_out)) and name != "run.test_epoch")
        if len(values) > 1 and not ignored:
            raise UserError(
                f"--group-by {','.join(keys)}: the runs differ in {name} too ({values[0]}, {values[1]}); use "
                f"--group-by {','.join([*keys, name])}"
            )
    variants = runs.apply(lambda run: " ".join(_value(run, params, key) for key in keys), axis=1)
    found = runs.assign(variant=variants, seed=runs["seed"].astype(int))
    twice = found[found.duplicated(["variant", "seed"])]
    if len(twice):
        variant, seed = twice.iloc[0][["variant", "seed"]]
        raise UserError(
            f"--group-by {','.join(keys)}: two runs of {variant} have the seed {seed}; delete one of them in MLflow"
        )
    return found, sorted(set(variants), key=_in_order)


def _columns_of(params: Sequence[str], key: str) -> list[str]:
    """The columns of a key; a list has one for each entry."""
    columns = [name for name in params if name == key or name.rpartition(".")[0] == key]
    if not columns:
        raise UserError(f"--group-by {key}: no finished run has this key; it is a key of the config such as wml.alpha")
    return columns


def _value(run: pd.Series[Any], params: Sequence[str], key: str) -> str:
    texts = [str(run[name]) for name in _columns_of(params, key) if isinstance(run[name], str)]
    text = texts[0] if _columns_of(params, key) == [key] and texts else f"[{', '.join(texts)}]" if texts else "unused"
    return text if key == "method.name" else f"{key.rpartition('.')[2]}={text}"


def _in_order(variant: str) -> list[tuple[float, str]]:
    words = [word.partition("=") for word in variant.split(" ")]
    return [(_number(value or name), value or name) for name, _, value in words]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _metrics(group: pd.DataFrame) -> dict[str, dict[int, float]]:
    """Metric name -> seed -> value, where the runs have it."""
    found = {}
    names = [name for name in group.columns if name.startswith(("test/accuracy/", "val/accuracy/")) or name in COSTS]
    for name in names:
        by_seed = zip(group["seed"], group[name], strict=True)
        found[name] = {int(seed): float(value) for seed, value in by_seed if not math.isnan(value)}
    for split in SPLITS:
        by_seed = zip(group["seed"], group["peers"], strict=True)
        means = {int(seed): sum(peer[split] for peer in peers) / len(peers) for seed, peers in by_seed}
        found[f"{split}/accuracy/peers"] = means
    return {name: values for name, values in found.items() if values}


def _row(
    name: str,
    group: pd.DataFrame,
    own: Mapping[str, dict[int, float]],
    first: Mapping[str, dict[int, float]],
    reference: Mapping[str, dict[int, float]],
) -> Row:
    estimates = {metric: estimate(list(values.values())) for metric, values in own.items()}
    costs = {metric: estimates.pop(metric) for metric in COSTS if metric in estimates}
    relative = {
        metric: cost.mean / estimate(list(reference[metric].values())).mean if metric in reference else math.nan
        for metric, cost in costs.items()
    }
    differences = {
        metric: paired_difference(own[metric], first[metric])
        for metric in estimates
        if metric in first and own is not first
    }
    peers = list(zip(*group["peers"], strict=True))
    macs = [sum(peer["macs"] for peer in same) / len(same) for same in peers]
    tree = float(group["peers/macs/tree"].mean()) if "peers/macs/tree" in group else math.nan
    seeds = sorted(int(seed) for seed in group["seed"])
    return Row(name, seeds, estimates, differences, costs, relative, macs, tree)
