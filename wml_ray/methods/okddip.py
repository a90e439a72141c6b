"""OKDDip (Chen et al., AAAI 2020): peers learn from mixtures of each other by attention, a leader from their mean."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wml_ray.errors import UserError
from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.checks import check_num_peers
from wml_ray.methods.feature_settings import OkddipConfig
from wml_ray.methods.losses import average_ensemble, cross_entropies, divergences
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class Okddip(Method):
    """sum_i CE(z_i, y) + w r [sum_a KL_T(z_a <- sum_b A_ab z_b) + KL_T(z_L <- mean_a z_a)].

    a, b are all peers but the leader L. A_ab = softmax_b <W_q f_a, W_k f_b> by image, with f the peers' features; W_q
    and W_k map features of each width into one space. As published, gradient flows into the mixed logits and into the
    leader's mean unless `stop_gradient_teacher`. r is the ramp.
    """

    selects: ClassVar[str] = "leader"
    settings: OkddipConfig

    def __init__(self, tree: PeerTree, settings: OkddipConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        check_num_peers(tree, "okddip", 3, "a leader and two that teach each other")
        self.leader = tree.num_peers - 1 if settings.leader is None else settings.leader
        if self.leader >= tree.num_peers:
            raise UserError(f"okddip.leader = {self.leader}: the peers are 0 to {tree.num_peers - 1}, or null the last")
        self.others = [peer for peer in range(tree.num_peers) if peer != self.leader]
        pooled = self.shapes(tree, spec).pooled
        self.widths = [pooled[peer].shape[1] for peer in self.others]
        key_width = settings.key_width or max(max(self.widths) // 8, 1)
        self.query, self.key = (
            nn.ModuleDict({str(width): nn.Linear(width, key_width, bias=False) for width in sorted(set(self.widths))})
            for _ in range(2)
        )

    def forward(self, inputs: Tensor) -> Outputs:
        """The logits, and the features of all peers but the leader side by side."""
        features = self.tree.features(inputs)
        pooled_BC = torch.cat([features.pooled[peer] for peer in self.others], dim=1)
        return {"logits_MBK": features.logits_MBK, "pooled_BC": pooled_BC}

    def attention(self, pooled_BC: Tensor) -> Tensor:
        """A of each image, shape (B, P, P) for the P peers besides the leader; rows are on the simplex."""
        features = pooled_BC.split(self.widths, dim=1)
        queries_BPD, keys_BPD = (
            torch.stack([maps[str(feature.shape[1])](feature) for feature in features], dim=1)
            for maps in (self.query, self.key)
        )
        return (queries_BPD @ keys_BPD.mT).softmax(-1)

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, and w r times the peers' and the leader's divergences."""
        logits_MBK, settings = outputs["logits_MBK"], self.settings
        others_PBK = logits_MBK[self.others]
        teachers_PBK = others_PBK.detach() if settings.stop_gradient_teacher else others_PBK
        mixed_PBK = torch.einsum("bpq,qbk->pbk", self.attention(outputs["pooled_BC"]), teachers_PBK)
        leader_1BK, mean_BK = logits_MBK[self.leader].unsqueeze(0), average_ensemble(teachers_PBK)
        share = settings.weight * context.ramp(settings.ramp)
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "mutual": share * divergences(others_PBK, mixed_PBK, settings.temperature).sum(),
            "leader": share * divergences(leader_1BK, mean_BK, settings.temperature).sum(),
        }

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """The leader, and the mean logits of all others."""
        logits_MBK = outputs["logits_MBK"]
        return {"leader": logits_MBK[self.leader], "ensemble_peers": average_ensemble(logits_MBK[self.others])}

    @staticmethod
    def prediction_names(num_peers: int) -> tuple[str, ...]:
        return ("leader", "ensemble_peers")
