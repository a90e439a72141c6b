"""What a family of peers is judged by: accuracy, diversity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wml_ray.methods.losses import average_ensemble, weighted_ensemble


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracies in [0, 1] over all workers' images."""

    peers: tuple[float, ...]
    ensemble_average: float
    ensemble_weighted: float
    diversity: float  # share of images on which two peers, taken at random, disagree

    def metrics(self, split: str) -> dict[str, float]:
        """Named as in MLflow: `val/accuracy/peer0` and so on."""
        named = {f"{split}/accuracy/peer{index}": value for index, value in enumerate(self.peers)}
        named[f"{split}/accuracy/ensemble_average"] = self.ensemble_average
        named[f"{split}/accuracy/ensemble_weighted"] = self.ensemble_weighted
        named[f"{split}/diversity"] = self.diversity
        return named


def metric_names(num_peers: int) -> list[str]:
    """Every metric a run logs, but for the test accuracies: what a study can take as an objective."""
    peers = [f"peer{index}" for index in range(num_peers)]
    families = {
        "val/accuracy": [*peers, "smallest_peer", "ensemble_average", "ensemble_weighted"],
        "val": ["diversity"],
        "train": ["loss", "images_per_second", "learning_rate"],
        "weights": peers,
        "peers/macs": [*peers, "tree"],
        "peers/params": [*peers, "tree"],
        "peers/channels": peers,
        "peers/latency_ms": peers,
    }
    return [f"{family}/{name}" for family, names in families.items() for name in names]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], weights_M: Tensor) -> Evaluation:
    """Accuracies of `model` in eval mode; with torch.distributed, of all workers' batches together.

    Whole images are counted, so the result does not depend on how they are spread over workers.
    """
    num_peers = len(weights_M)
    counts = torch.zeros(num_peers + 4, dtype=torch.float64, device=weights_M.device)
    was_training = model.training
    model.eval()
    for inputs, targets in batches:
        logits_MBK = model(inputs).float()  # whatever precision the network ran in
        ensembles = [average_ensemble(logits_MBK), weighted_ensemble(logits_MBK, weights_M)]
        predictions = torch.cat([logits_MBK.argmax(-1), torch.stack(ensembles).argmax(-1)])
        counts[: num_peers + 2] += (predictions == targets).sum(1)
        counts[-2] += _disagreements(predictions[:num_peers], logits_MBK.shape[-1])
        counts[-1] += len(targets)
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts)
    shares = (counts[:-1] / counts[-1]).tolist()
    return Evaluation(tuple(shares[:num_peers]), *shares[num_peers:])


def _disagreements(predictions_MB: Tensor, num_classes: int) -> Tensor:
    """Disagreeing share of the pairs of peers, summed over images; from votes per class, without forming pairs."""
    num_peers = len(predictions_MB)
    if num_peers == 1:
        return predictions_MB.new_zeros(())
    votes_BK = torch.nn.functional.one_hot(predictions_MB, num_classes).sum(0)
    agreeing_B = (votes_BK * (votes_BK - 1)).sum(-1)
    return (1 - agreeing_B.double() / (num_peers * (num_peers - 1))).sum()
