"""ONE (Lan et al., NeurIPS 2018): peers on a shared trunk learn from their mixture, which a gate weighs by image."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.checks import check_shared_stage
from wml_ray.methods.feature_settings import OneConfig
from wml_ray.methods.losses import cross_entropies, divergences
from wml_ray.networks.features import mean_over_positions
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class One(Method):
    """sum_i CE(z_i, y) + CE(z_e, y) + w r sum_i KL_T(z_i <- z_e), with z_e = sum_i g_i z_i.

    g, on the simplex, is the gate of the deepest map that all peers share. No gradient flows into the teacher z_e: the
    gate learns from CE(z_e, y) alone. r is the ramp.
    """

    selects: ClassVar[str] = "ensemble_gate"
    settings: OneConfig

    def __init__(self, tree: PeerTree, settings: OneConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        check_shared_stage(tree, "one", "whose map its gate sees")
        width = mean_over_positions(self.shapes(tree, spec).maps[tree.shared_stages - 1][0]).shape[1]
        self.gate = nn.Sequential(
            nn.Linear(width, tree.num_peers), nn.BatchNorm1d(tree.num_peers), nn.ReLU(), nn.Softmax(-1)
        )

    def forward(self, inputs: Tensor) -> Outputs:
        """The logits, and the gate g of each image."""
        features = self.tree.features(inputs)
        trunk = features.maps[self.tree.shared_stages - 1][0]
        return {"logits_MBK": features.logits_MBK, "gate_BM": self.gate(mean_over_positions(trunk))}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, that of the mixture, and w r times the divergences from the mixture."""
        logits_MBK, ensemble_BK, settings = outputs["logits_MBK"], _mixture(outputs), self.settings
        from_mixture_M = divergences(logits_MBK, ensemble_BK.detach(), settings.temperature)
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "gate": F.cross_entropy(ensemble_BK, targets_B),
            "mutual": settings.weight * context.ramp(settings.ramp) * from_mixture_M.sum(),
        }

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """The mixture z_e."""
        return {"ensemble_gate": _mixture(outputs)}

    @staticmethod
    def prediction_names(num_peers: int) -> tuple[str, ...]:
        return ("ensemble_gate",)


def _mixture(outputs: Outputs) -> Tensor:
    """sum_i g_i z_i of each image, shape (B, K)."""
    return torch.einsum("bm,mbk->bk", outputs["gate_BM"], outputs["logits_MBK"])
