"""Hints (FitNets, Romero et al., ICLR 2015): the maps of a stage imitate those of a frozen teacher.

Hints and labels are learned in one phase, where the paper learns the hints first.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wml_ray.errors import UserError
from wml_ray.methods.base import Outputs, StepContext, TaughtMethod, Teacher
from wml_ray.methods.losses import cross_entropies
from wml_ray.methods.settings import FitnetsConfig
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.networks.spec import ImageSpec


class Fitnets(TaughtMethod):
    """sum_i CE(z_i, y) + w sum_c MSE(adapter_c(F_c), F_t) over a stage's copies c; adapters are 1x1 convolutions."""

    needs_features: ClassVar[bool] = True
    settings: FitnetsConfig

    def __init__(self, tree: PeerTree, settings: FitnetsConfig, spec: ImageSpec, teacher: Teacher) -> None:
        """Make a 1x1 convolution for each copy of the stage.

        Raises:
            UserError: the stage is not one of both networks, or their maps have other sizes.
        """
        super().__init__(tree, settings, spec, teacher)
        self.stage = -1 if settings.stage is None else settings.stage
        maps, teacher_maps = (self.shapes(network, spec).maps for network in (tree, teacher.tree))
        shared = min(len(maps), len(teacher_maps))
        if self.stage >= shared or not shared:
            raise UserError(
                f"fitnets.stage = {settings.stage}: the peers have {len(maps)} stages before the head, the teacher "
                f"{len(teacher_maps)}; name one of both, counted from 0, or null for the last of each"
            )
        (teacher_map,) = teacher_maps[self.stage]
        for own_map in maps[self.stage]:
            if own_map.dim() != 4 or own_map.shape[2:] != teacher_map.shape[2:]:
                raise UserError(
                    f"fitnets.stage = {settings.stage}: the maps are {_size(own_map)}, those of the teacher "
                    f"{_size(teacher_map)}; name a stage where both are (C, H, W) with the same H and W, or another "
                    "teacher"
                )
        self.adapters = nn.ModuleList(
            nn.Conv2d(own_map.shape[1], teacher_map.shape[1], 1) for own_map in maps[self.stage]
        )

    def forward(self, inputs: Tensor) -> Outputs:
        """The peers' logits and, in training, the adapted maps of each copy and the teacher's maps."""
        if not self.training:
            return super().forward(inputs)
        features = self.tree.features(inputs)
        pairs = enumerate(zip(self.adapters, features.maps[self.stage], strict=True))
        hints = {f"hint{copy}": adapter(own_map) for copy, (adapter, own_map) in pairs}
        (teacher_map,) = self.teacher.features(inputs).maps[self.stage]
        return {"logits_MBK": features.logits_MBK, **hints, "teacher_map": teacher_map}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, and the weighted errors of the hints."""
        errors = [
            F.mse_loss(outputs[f"hint{copy}"], outputs["teacher_map"].detach()) for copy in range(len(self.adapters))
        ]
        return {
            "labels": cross_entropies(outputs["logits_MBK"], targets_B).sum(),
            "hints": self.settings.weight * torch.stack(errors).sum(),
        }


def _size(feature_map: Tensor) -> str:
    return "x".join(map(str, feature_map.shape[1:]))
