"""Accuracy and diversity of a family of peers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wml_ray.distributed import sum_of_workers
from wml_ray.methods.base import Batch, Method
from wml_ray.methods.losses import average_ensemble
from wml_ray.methods.registry import method_class
from wml_ray.networks.peer_tree import in_mode
from wml_ray.training.precision import forward

AVERAGE = "ensemble_average"


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracies in [0, 1] over all workers' images."""

    peers: tuple[float, ...]
    predictions: dict[str, float]  # the average ensemble and the method's predictions, by name
    selects: str  # the prediction that stands for the method
    diversity: float  # share of images on which two peers, drawn at random, disagree

    def metrics(self, split: str) -> dict[str, float]:
        """Named as in MLflow: `val/accuracy/peer0` and so on."""
        accuracies = {f"peer{index}": value for index, value in enumerate(self.peers)} | self.predictions
        accuracies["method"] = self.predictions[self.selects]
        named = {f"{split}/accuracy/{name}": value for name, value in accuracies.items()}
        return {**named, f"{split}/diversity": self.diversity}


def prediction_names(method: str, num_peers: int) -> tuple[str, ...]:
    """The predictions that are evaluated besides the peers."""
    return (AVERAGE, *method_class(method).prediction_names(num_peers))


def metric_names(method: str, num_peers: int) -> list[str]:
    """Metrics that a run logs and a study can have as objectives.

    Test accuracies, terms of the loss and the cost of the whole training are not among them.
    """
    peers = [f"peer{index}" for index in range(num_peers)]
    families = {
        "val/accuracy": [*peers, "smallest_peer", *prediction_names(method, num_peers), "method"],
        "val": ["diversity"],
        "train": ["loss", "images_per_second", "learning_rate"],
        "peers/macs": [*peers, "tree"],
        "peers/params": [*peers, "tree"],
        "peers/channels": peers,
        "peers/latency_ms": peers,
    }
    names = [f"{family}/{name}" for family, names in families.items() for name in names]
    return [*names, *method_class(method).metric_names(num_peers)]


@torch.no_grad()
def evaluate(method: Method, batches: Iterable[Batch]) -> Evaluation:
    """Accuracies of `method` in evaluation mode and float32, over the batches of all workers together.

    Whole images are counted, so the result does not depend on their distribution over workers.
    """
    num_peers = method.tree.num_peers
    names = (AVERAGE, *method.prediction_names(num_peers))
    device = next(method.parameters()).device
    counts = torch.zeros(num_peers + len(names) + 2, dtype=torch.float64, device=device)
    with in_mode(method, training=False):
        for inputs, targets in batches:
            outputs = forward(method, inputs, "float32")
            logits_MBK = outputs["logits_MBK"]
            predictions = {AVERAGE: average_ensemble(logits_MBK), **method.predictions(outputs)}
            combined = torch.stack([predictions[name] for name in names])
            classes = torch.cat([logits_MBK.argmax(-1), combined.argmax(-1)])
            counts[:-2] += (classes == targets).sum(1)
            counts[-2] += _disagreements(classes[:num_peers], logits_MBK.shape[-1])
            counts[-1] += len(targets)
    counts = sum_of_workers(counts)
    *shares, diversity = (counts[:-1] / counts[-1]).tolist()
    accuracies = dict(zip(names, shares[num_peers:], strict=True))
    return Evaluation(tuple(shares[:num_peers]), accuracies, method.selects, diversity)


def _disagreements(predictions_MB: Tensor, num_classes: int) -> Tensor:
    """Disagreeing share of the pairs of peers, summed over images; from votes per class, without forming pairs."""
    num_peers = len(predictions_MB)
    if num_peers == 1:
        return predictions_MB.new_zeros(())
    votes_BK = torch.nn.functional.one_hot(predictions_MB, num_classes).sum(0)
    agreeing_B = (votes_BK * (votes_BK - 1)).sum(-1)
    return (1 - agreeing_B.double() / (num_peers * (num_peers - 1))).sum()
