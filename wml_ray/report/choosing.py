"""The networks of finished runs, and those that fit the limits of a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.errors import UserError
from wml_ray.report.style import new_table, prediction_words, short_count

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

ENSEMBLES = ("ensemble_average", "ensemble_weighted")


@dataclass(frozen=True)
class Candidate:
    """One network of a finished run. Accuracies are shares; `latency_ms` is None of an ensemble: it is not measured."""

    folder: Path
    network: str  # "peer2", "ensemble_average" or "ensemble_weighted"
    params: int
    macs: int
    latency_ms: float | None
    validation_accuracy: float
    test_accuracy: float

    @property
    def choice(self) -> str:
        """The value of --peer: a number, or the kind of the ensemble."""
        return self.network.removeprefix("peer").removeprefix("ensemble_")


@dataclass(frozen=True)
class Limits:
    """What a device allows; None is no limit."""

    macs: float | None = None
    params: float | None = None
    latency_ms: float | None = None
    min_accuracy: float | None = None

    def excess(self, candidate: Candidate) -> dict[str, tuple[float, float]]:
        """Each limit that the candidate misses, with its own value and by which share it misses."""
        missed = {}
        for name in ("macs", "params", "latency_ms"):
            limit, value = getattr(self, name), getattr(candidate, name)
            if limit is not None and (value is None or value > limit):
                missed[name] = (value, float("inf") if value is None else value / limit - 1)
        if self.min_accuracy is not None and candidate.validation_accuracy < self.min_accuracy:
            accuracy = candidate.validation_accuracy
            missed["min_accuracy"] = (accuracy, self.min_accuracy / max(accuracy, 1e-9) - 1)
        return missed


def candidates_of(result: Mapping[str, Any], folder: Path) -> list[Candidate]:
    """Every peer, and the average and the weighted ensemble, of a finished run; `result` is result.json."""
    found = [
        Candidate(
            folder,
            f"peer{peer['peer']}",
            peer["params"],
            peer["macs"],
            peer["latency_ms"],
            peer["validation_accuracy"],
            peer["test_accuracy"],
        )
        for peer in result["peers"]
    ]
    tree = result["tree"]
    for name in ENSEMBLES:
        if accuracies := result["predictions"].get(name):
            values = accuracies["validation_accuracy"], accuracies["test_accuracy"]
            found.append(Candidate(folder, name, tree["params"], tree["macs"], None, *values))
    return found


def fitting(candidates: Sequence[Candidate], limits: Limits) -> list[Candidate]:
    """The candidates within the limits, the highest validation accuracy first; of equals, the fewest MACs.

    Raises:
        UserError: none is; the message says by how much the nearest misses.
    """
    fit = [candidate for candidate in candidates if not limits.excess(candidate)]
    if not fit:
        raise UserError(_nearest_miss(candidates, limits))
    return sorted(fit, key=lambda candidate: (-candidate.validation_accuracy, candidate.macs, candidate.params))


def on_front(candidates: Iterable[Candidate]) -> set[Candidate]:
    """The candidates that no other is as accurate as on validation images with fewer MACs, or more so with as many."""
    front: set[Candidate] = set()
    best = (0, -1.0)  # MACs and accuracy of the last one added
    for candidate in sorted(candidates, key=lambda each: (each.macs, -each.validation_accuracy)):
        costs = (candidate.macs, candidate.validation_accuracy)
        if costs == best or candidate.validation_accuracy > best[1]:
            best = costs
            front.add(candidate)
    return front


def candidates_table(candidates: Sequence[Candidate]) -> Table:
    """One row a candidate; those on the Pareto front of accuracy and MACs are marked with a star."""
    front = on_front(candidates)
    table = new_table("run", "network", "front", "params", "MACs", "latency\nms", "val\n%", "test\n%")
    for candidate in candidates:
        table.add_row(
            candidate.folder.name,
            prediction_words(candidate.network),
            "*" if candidate in front else "",
            short_count(candidate.params),
            short_count(candidate.macs),
            "" if candidate.latency_ms is None else f"{candidate.latency_ms:.2f}",
            f"{candidate.validation_accuracy * 100:.2f}",
            f"{candidate.test_accuracy * 100:.2f}",
        )
    return table


def candidates_frame(candidates: Sequence[Candidate]) -> pd.DataFrame:
    """One row a candidate, with every figure."""
    import pandas as pd

    front = on_front(candidates)
    rows = [{**vars(each), "folder": str(each.folder), "front": each in front} for each in candidates]
    return pd.DataFrame(rows)


def _nearest_miss(candidates: Sequence[Candidate], limits: Limits) -> str:
    nearest = min(candidates, key=lambda candidate: max(share for _, share in limits.excess(candidate).values()))
    words = []
    for name, (value, _) in limits.excess(nearest).items():
        limit = getattr(limits, name)
        if name == "min_accuracy":
            words.append(f"{value:.2%} on validation images, {limit - value:.2%} below --min-accuracy {limit:g}")
        elif value is None:
            words.append("no measured latency, as an ensemble")
        elif name == "latency_ms":
            words.append(f"a latency of {value:.2f} ms, {value - limit:.2f} ms above --max-latency-ms {limit:g}")
        else:
            unit = {"macs": "MACs"}.get(name, name)
            words.append(f"{short_count(value)} {unit}, {short_count(value - limit)} above {short_count(limit)}")
    name = f"{prediction_words(nearest.network)} of {nearest.folder.name}"
    return f"no network is within the limits; the nearest, {name}, has {' and '.join(words)}"
