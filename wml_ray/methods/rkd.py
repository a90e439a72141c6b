"""Relational knowledge distillation (Park et al., CVPR 2019): distances and angles between images, from a teacher."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from wml_ray.methods.base import Outputs, StepContext, TaughtMethod
from wml_ray.methods.losses import cross_entropies
from wml_ray.methods.relations import angles, distances, relation_loss
from wml_ray.methods.settings import RkdConfig


class Rkd(TaughtMethod):
    """sum_i [CE(z_i, y) + a distance(f_i, f_t) + b angle(f_i, f_t)] of the pooled features f; widths may differ."""

    needs_features: ClassVar[bool] = True
    settings: RkdConfig

    def forward(self, inputs: Tensor) -> Outputs:
        """The peers' logits and, in training, their pooled features and the teacher's."""
        if not self.training:
            return super().forward(inputs)
        features = self.tree.features(inputs)
        pooled = {f"pooled{peer}": pooled_BD for peer, pooled_BD in enumerate(features.pooled)}
        (teacher_BD,) = self.teacher.features(inputs).pooled
        return {"logits_MBK": features.logits_MBK, **pooled, "teacher_pooled": teacher_BD}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, and the weighted relations by distance and by angle."""
        students = [outputs[f"pooled{peer}"] for peer in range(self.tree.num_peers)]
        teacher_BD = outputs["teacher_pooled"]
        teacher_BB, teacher_BBB = distances(teacher_BD), angles(teacher_BD)
        by_distance = torch.stack([relation_loss(distances(student_BD), teacher_BB) for student_BD in students])
        by_angle = torch.stack([relation_loss(angles(student_BD), teacher_BBB) for student_BD in students])
        return {
            "labels": cross_entropies(outputs["logits_MBK"], targets_B).sum(),
            "distance": self.settings.distance_weight * by_distance.sum(),
            "angle": self.settings.angle_weight * by_angle.sum(),
        }
