"""How a network classifies a set of labelled images: accuracy, recall, confusion, calibration, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wml_ray.report.intervals import wilson_interval
from wml_ray.report.style import new_axes, new_table, prediction_words, save_figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

Array = np.ndarray[Any, np.dtype[Any]]
CALIBRATION_BINS = 15  # of equal width, over the probability of the predicted class
MAX_NUMBERED_CLASSES = 20  # up to so many, the picture of a confusion matrix has its counts


@dataclass(frozen=True)
class Evaluation:
    """One network on one set of images."""

    network: str  # "peer2", "ensemble_average" ...
    classes: tuple[str, ...]
    confusion: Array  # (K, K) counts: row the label, column the prediction
    calibration_error: float

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return float(np.trace(self.confusion) / self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, by Wilson's score."""
        return wilson_interval(self.accuracy, self.images)

    @property
    def recalls(self) -> Array:
        """(K,) share of each class's images that are classified correctly; nan for a class without images."""
        counts = self.confusion.sum(1)
        return np.where(counts > 0, np.diag(self.confusion) / np.maximum(counts, 1), np.nan)


def evaluate_logits(network: str, classes: Sequence[str], logits_BK: Array, labels_B: Array) -> Evaluation:
    """The evaluation of a network from its logits (B, K) and the labels (B,)."""
    predictions = logits_BK.argmax(-1)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels_B, predictions), 1)
    return Evaluation(network, tuple(classes), confusion, calibration_error(logits_BK, labels_B))


def calibration_error(logits_BK: Array, labels_B: Array) -> float:
    """Expected calibration error (Guo et al., ICML 2017): the mean gap of accuracy and probability over 15 equal bins.

    Bins are weighted by their numbers of images; the last one includes probability 1.
    """
    shifted = logits_BK.astype(np.float64) - logits_BK.max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels_B
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels_B))


def agreement(predictions: Mapping[str, Array]) -> pd.DataFrame:
    """Share of the images on which two networks predict the same class, for each pair of networks."""
    import pandas as pd

    shares = {
        one: {other: float((ours == theirs).mean()) for other, theirs in predictions.items()}
        for one, ours in predictions.items()
    }
    return pd.DataFrame(shares)


def evaluation_table(found: Sequence[Evaluation]) -> Table:
    """One row a network: accuracy with its interval, calibration error and the class with the lowest recall."""
    headings = ("accuracy\n%", "95 % interval\n%", "calibration\nerror", "lowest recall\n%", "\nof class")
    table = new_table("network", *headings)
    for each in found:
        low, high = each.interval
        worst = int(np.nanargmin(each.recalls))
        table.add_row(
            prediction_words(each.network),
            f"{each.accuracy * 100:.2f}",
            f"{low * 100:.2f} to {high * 100:.2f}",
            f"{each.calibration_error:.4f}",
            f"{each.recalls[worst] * 100:.2f}",
            each.classes[worst],
        )
    return table


def agreement_table(shares: pd.DataFrame) -> Table:
    """`agreement` in per cent."""
    table = new_table("same class\n%", *(f"\n{name.removeprefix('peer')}" for name in shares.columns))
    for name, row in shares.iterrows():
        table.add_row(prediction_words(str(name)), *(f"{share * 100:.1f}" for share in row))
    return table


def write_evaluation(found: Sequence[Evaluation], shares: pd.DataFrame, folder: Path) -> list[Path]:
    """Write summary.csv, recall.csv, agreement.csv, and each network's confusion matrix as CSV and picture."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    tables = {"summary": summary_frame(found), "agreement": shares}
    recalls = {each.network: each.recalls for each in found}
    tables["recall"] = pd.DataFrame(recalls, index=pd.Index(found[0].classes, name="class"))
    for each in found:
        rows = pd.Index(each.classes, name="label")
        tables[f"confusion_{each.network}"] = pd.DataFrame(each.confusion, index=rows, columns=list(each.classes))
    paths = []
    for name, table in tables.items():
        paths.append(folder / f"{name}.csv")
        table.to_csv(paths[-1])
    return [*paths, *save_figures({f"confusion_{each.network}": _picture(each) for each in found}, folder)]


def summary_frame(found: Sequence[Evaluation]) -> pd.DataFrame:
    """One row a network, with its figures as shares."""
    import pandas as pd

    rows = [
        {
            "network": each.network,
            "images": each.images,
            "accuracy": each.accuracy,
            "low": each.interval[0],
            "high": each.interval[1],
            "calibration_error": each.calibration_error,
        }
        for each in found
    ]
    return pd.DataFrame(rows).set_index("network")


def _picture(each: Evaluation) -> Figure:
    """The confusion matrix in shares of each label's images."""
    size = len(each.classes)
    shares = each.confusion / np.maximum(each.confusion.sum(1, keepdims=True), 1)
    title = f"{prediction_words(each.network)}: {each.accuracy:.2%} of {each.images:,} images"
    figure, axes = new_axes(title, "predicted class", "class")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    if size <= MAX_NUMBERED_CLASSES:
        axes.set_xticks(range(size), each.classes, rotation=45, ha="right", fontsize="small")
        axes.set_yticks(range(size), each.classes, fontsize="small")
        for label, prediction in np.argwhere(each.confusion > 0):
            colour = "white" if shares[label, prediction] > 0.5 else "black"
            count = str(each.confusion[label, prediction])
            axes.text(prediction, label, count, ha="center", va="center", color=colour, fontsize="x-small")
    return figure
