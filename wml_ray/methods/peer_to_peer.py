"""Peer-to-peer mutual learning beside a teacher (Niyaz and Bathula, ISBI 2022): peer 0 teaches all other peers.

The others, the students, also teach each other. The teacher is trained in the same run, on the labels alone.
"""

from __future__ import annotations

from torch import Tensor

from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.losses import cross_entropies, divergences, divergences_from_others
from wml_ray.methods.settings import PeerToPeerConfig


class PeerToPeer(Method):
    """sum_i CE(z_i, y) + sum_{i>0} [a KL_T(z_i <- z_0) + b mean_{j>0, j != i} KL_T(z_i <- z_j)].

    No gradient flows into the teaching logits.
    """

    settings: PeerToPeerConfig

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies, a times the divergences from the teacher, and b times those from the other students."""
        logits_MBK, temperature = outputs["logits_MBK"], self.settings.temperature
        students_MBK = logits_MBK[1:]
        return {
            "labels": cross_entropies(logits_MBK, targets_B).sum(),
            "teacher": self.settings.teacher_weight
            * divergences(students_MBK, logits_MBK[0].detach(), temperature).sum(),
            "mutual": self.settings.mutual_weight * divergences_from_others(students_MBK, temperature).sum(),
        }
