"""KDCL (Guo et al., CVPR 2020): each peer sees a view of its own and learns from the labels and the mean of all peers.

Whether gradient flows into the mean makes no difference: that of all peers' divergences by the mean logits is zero.
The paper's variants that choose or weigh the peers' logits are not here.
"""

from __future__ import annotations

from torch import Tensor

from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.losses import average_ensemble, cross_entropies, divergences
from wml_ray.methods.settings import KdclConfig


class Kdcl(Method):
    """sum_i [(1-a) CE(z_i, y) + a KL_T(z_i <- mean_j z_j)], without gradient into the mean."""

    own_views = True
    settings: KdclConfig

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """1-a times the cross-entropies, and a times the divergences from the mean logits of all peers."""
        logits_MBK, alpha = outputs["logits_MBK"], self.settings.alpha
        from_mean_M = divergences(logits_MBK, average_ensemble(logits_MBK.detach()), self.settings.temperature)
        return {
            "labels": (1.0 - alpha) * cross_entropies(logits_MBK, targets_B).sum(),
            "mutual": alpha * from_mean_M.sum(),
        }
