"""Weighted Mutual Learning (Zhang et al., NeurIPS 2022): peers teach each other, weighted by a learned omega."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from wml_ray.methods.base import Batch, Method, NonFinite, Outputs, StepContext
from wml_ray.methods.hypergradient import log_mirror_descent, weight_gradient
from wml_ray.methods.losses import inner_loss, weighted_ensemble
from wml_ray.methods.settings import WmlConfig
from wml_ray.networks.peer_tree import PeerTree, describe_peers
from wml_ray.networks.spec import ImageSpec


class Wml(Method):
    """Eq. 1 as the loss; Eqs. 5 and 7 every `update_every` steps; the weighted ensemble as the prediction."""

    selects: ClassVar[str] = "ensemble_weighted"
    settings: WmlConfig
    log_weights_M: Tensor

    def __init__(self, tree: PeerTree, settings: WmlConfig, spec: ImageSpec) -> None:
        super().__init__(tree, settings, spec)
        equal_M = torch.full((tree.num_peers,), -math.log(tree.num_peers), dtype=torch.float64)
        self.register_buffer("log_weights_M", equal_M)
        self.own_views = settings.own_views
        if settings.weights == "learned" and tree.num_peers > 1:
            self.outer_batch_interval = settings.update_every
            # v, and with the exact point also dL1/dtheta and the stepped theta
            self.extra_copies = 1 if settings.unroll == "same_point" else 3

    @property
    def weights_M(self) -> Tensor:
        """omega, (M,) float64 on the simplex."""
        return self.log_weights_M.exp()

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """Eq. 1, or its balanced form."""
        kl_share = context.ramp(self.settings.ramp)
        return {"inner": inner_loss(outputs["logits_MBK"], targets_B, self.weights_M, self.settings, kl_share)}

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """The weighted ensemble, sum_i omega_i z_i."""
        return {"ensemble_weighted": weighted_ensemble(outputs["logits_MBK"], self.weights_M)}

    @staticmethod
    def prediction_names(num_peers: int) -> tuple[str, ...]:
        return ("ensemble_weighted",)

    def metrics(self) -> dict[str, float]:
        """The peer weights omega."""
        return dict(zip(self.metric_names(self.tree.num_peers), self.weights_M.tolist(), strict=True))

    @staticmethod
    def metric_names(num_peers: int) -> tuple[str, ...]:
        return tuple(f"weights/peer{index}" for index in range(num_peers))

    def after_step(self, context: StepContext, batch: Batch, outer_batch: Batch | None) -> None:
        """Eqs. 5 and 7 where an outer batch is given."""
        if outer_batch is None:
            return
        gradient_M = weight_gradient(self.tree, batch, outer_batch, self.weights_M, self.settings, context)
        self.log_weights_M.copy_(log_mirror_descent(self.log_weights_M, gradient_M, self.settings.mirror_step_size))
        if not self.log_weights_M.isfinite().all():
            bad = [index for index, g in enumerate(gradient_M.tolist()) if not math.isfinite(g)]
            raise NonFinite(f"the gradient of the weight of {describe_peers(bad)}")
