"""Deep Mutual Learning (Zhang et al., CVPR 2018): each peer learns from the labels and from the mean of the others.

As in the paper's equations, the divergences are averaged over the other peers. One optimiser updates all peers after
one forward pass, where the paper updates one network after the other.
"""

from __future__ import annotations

from torch import Tensor

from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.losses import cross_entropies, divergences_from_others
from wml_ray.methods.settings import DmlConfig


class Dml(Method):
    """sum_i [CE(z_i, y) + w mean_{j != i} KL_T(z_i <- z_j)], without gradient into the teachers z_j."""

    settings: DmlConfig

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, and w times the divergences from the other peers."""
        logits_MBK = outputs["logits_MBK"]
        mutual_M = divergences_from_others(logits_MBK, self.settings.temperature)
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "mutual": self.settings.weight * mutual_M.sum(),
        }
