"""Knowledge distillation (Hinton et al., 2015): each peer learns from the labels and from a frozen teacher."""

from __future__ import annotations

from torch import Tensor

from wml_ray.methods.base import Outputs, StepContext, TaughtMethod
from wml_ray.methods.losses import cross_entropies, divergences
from wml_ray.methods.settings import KdConfig


class Kd(TaughtMethod):
    """sum_i [(1 - a) CE(z_i, y) + a KL_T(z_i <- t)], t the mean of the teacher's logits over its peers."""

    settings: KdConfig

    def forward(self, inputs: Tensor) -> Outputs:
        """The peers' logits and, in training, the teacher's."""
        outputs = super().forward(inputs)
        if self.training:
            outputs["teacher_BK"] = self.teacher.logits(inputs).mean(0)
        return outputs

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """1 - a times the cross-entropies, and a times the divergences from the teacher."""
        logits_MBK, alpha = outputs["logits_MBK"], self.settings.alpha
        taught_M = divergences(logits_MBK, outputs["teacher_BK"], self.settings.temperature)
        return {
            "labels": (1.0 - alpha) * cross_entropies(logits_MBK, targets_B).sum(),
            "teacher": alpha * taught_M.sum(),
        }
