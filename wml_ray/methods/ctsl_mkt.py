"""Mutual learning of relations and logits beside self-learning (CTSL-MKT, arXiv 2101.08471).

Known from a summary; weights and temperature are ours. The first phase, in which each peer is trained alone, is an
independent run that is named as the teacher.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from wml_ray.methods.base import Outputs, StepContext, TaughtMethod
from wml_ray.methods.losses import cross_entropies, divergences, divergences_from_others
from wml_ray.methods.relations import angles, distances, relation_loss
from wml_ray.methods.settings import CtslMktConfig


class CtslMkt(TaughtMethod):
    """sum_i [CE(z_i, y) + b (R_i + mean_{j != i} KL_1(z_i <- z_j)) + c KL_T(z_i <- z_i as the run began)].

    R_i = mean_{j != i} [distance(f_i, f_j) + a angle(f_i, f_j)] of the pooled features. No gradient flows into peer j
    as the teacher of peer i.
    """

    starts_as_teacher: ClassVar[bool] = True
    settings: CtslMktConfig

    def forward(self, inputs: Tensor) -> Outputs:
        """The peers' logits and, in training, their pooled features and the logits of the peers at the start."""
        if not self.training:
            return super().forward(inputs)
        features = self.tree.features(inputs)
        pooled = {f"pooled{peer}": pooled_BD for peer, pooled_BD in enumerate(features.pooled)}
        return {"logits_MBK": features.logits_MBK, **pooled, "teacher_MBK": self.teacher.logits(inputs)}

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, the weighted relations and divergences between peers, and those from the start."""
        logits_MBK, settings = outputs["logits_MBK"], self.settings
        peers = range(self.tree.num_peers)
        by_distance = [distances(outputs[f"pooled{peer}"]) for peer in peers]
        by_angle = [angles(outputs[f"pooled{peer}"]) for peer in peers]
        pairs = [(i, j) for i in peers for j in peers if i != j]
        relations = logits_MBK.new_zeros(())
        for i, j in pairs:
            relations = relations + relation_loss(by_distance[i], by_distance[j])
            relations = relations + settings.angle_weight * relation_loss(by_angle[i], by_angle[j])
        mutual_M = divergences_from_others(logits_MBK, temperature=1.0)
        self_M = divergences(logits_MBK, outputs["teacher_MBK"], settings.temperature)
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "relations": settings.mutual_weight * relations / max(len(peers) - 1, 1),
            "mutual": settings.mutual_weight * mutual_M.sum(),
            "self": settings.self_weight * self_M.sum(),
        }
