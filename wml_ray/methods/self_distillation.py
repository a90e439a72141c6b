"""Self-distillation: the early exits of one network learn from its last.

SD (Zhang et al., ICCV 2019) and SCAN (Zhang et al., NeurIPS 2019) are this loss with different weights; without
divergences and features it is deep supervision (DSN, Lee et al., AISTATS 2015). Exits have no attention, and no image
leaves at an early exit.
"""

from __future__ import annotations

from torch import Tensor, nn

from wml_ray.errors import UserError
from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.feature_settings import SelfDistillationConfig
from wml_ray.methods.losses import cross_entropies, divergences
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class SelfDistillation(Method):
    """CE(z_d, y) + sum_{i<d} [a CE(z_i, y) + b KL_T(z_i <- z_d) + c |A_i f_i - f_d|^2], d the last exit.

    f are the peers' features and A_i is linear; the squared norm is averaged over images. No gradient flows into the
    teachers z_d and f_d.
    """

    settings: SelfDistillationConfig

    def __init__(self, tree: PeerTree, settings: SelfDistillationConfig, spec: ImageSpec) -> None:
        """Make a linear layer for each early exit.

        Raises:
            UserError: the tree has no exits.
        """
        super().__init__(tree, settings, spec)
        if not tree.exits:
            raise UserError(
                "method.name = self_distillation needs exits of one network as peers, the last of which teaches; set "
                "them, such as model.sharing = [1, 1, 1, 1, 3] with model.exits = [2, 3, 4]"
            )
        *early, last = (pooled.shape[1] for pooled in self.shapes(tree, spec).pooled)
        self.adapters = nn.ModuleList(nn.Linear(width, last) for width in early)

    def forward(self, inputs: Tensor) -> Outputs:
        """The logits and, in training, the adapted features of the early exits and the feature of the last."""
        if not self.training:
            return super().forward(inputs)
        features = self.tree.features(inputs)
        *early, last = features.pooled
        pairs = enumerate(zip(self.adapters, early, strict=True))
        adapted = {f"adapted{peer}": adapter(pooled_BD) for peer, (adapter, pooled_BD) in pairs}
        return {"logits_MBK": features.logits_MBK, **adapted, "last_BD": last}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, and the early exits' weighted divergences and squared distances from the last."""
        logits_MBK, settings = outputs["logits_MBK"], self.settings
        *early, last = cross_entropies(logits_MBK, targets_B)
        from_last_M = divergences(logits_MBK[:-1], logits_MBK[-1].detach(), settings.temperature)
        distance = logits_MBK.new_zeros(())
        for peer in range(len(self.adapters)):
            errors_BD = outputs[f"adapted{peer}"] - outputs["last_BD"].detach()
            distance = distance + errors_BD.square().sum(1).mean()
        return {
            "labels": last + settings.label_weight * sum(early, start=last.new_zeros(())),
            "self": settings.divergence_weight * from_last_M.sum(),
            "features": settings.feature_weight * distance,
        }
