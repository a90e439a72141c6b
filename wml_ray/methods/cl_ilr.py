"""CL-ILR (Song and Chai, NeurIPS 2018): peers with a shared trunk learn from the labels and the mean of the others.

Its backpropagation rescaling divides the gradient that enters a shared copy by the number of peers below it.
"""

from __future__ import annotations

from torch import Tensor

from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.losses import cross_entropies, divergences
from wml_ray.methods.settings import ClIlrConfig
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec
from wml_ray.networks.trunk_gradient import divide_shared_gradients


class ClIlr(Method):
    """sum_i [(1-a) CE(z_i, y) + a KL_T(z_i <- mean_{j != i} z_j)], without gradient into the mean."""

    settings: ClIlrConfig

    def __init__(self, tree: PeerTree, settings: ClIlrConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        divide_shared_gradients(tree)

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """1-a times the cross-entropies, and a times the divergences from the mean logits of the other peers."""
        logits_MBK, alpha = outputs["logits_MBK"], self.settings.alpha
        from_others_M = divergences(logits_MBK, _means_of_others(logits_MBK.detach()), self.settings.temperature)
        return {
            "labels": (1.0 - alpha) * cross_entropies(logits_MBK, targets_B).sum(),
            "mutual": alpha * from_others_M.sum(),
        }


def _means_of_others(logits_MBK: Tensor) -> Tensor:
    """mean_{j != i} z_j for each peer i, shape (M, B, K); a single peer's own logits."""
    num_others = len(logits_MBK) - 1
    return (logits_MBK.sum(0) - logits_MBK) / num_others if num_others else logits_MBK
