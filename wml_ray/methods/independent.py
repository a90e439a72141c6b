"""Independent training: each peer learns from the labels alone, the baseline of all methods."""

from __future__ import annotations

from torch import Tensor

from wml_ray.methods.base import Method, Outputs, StepContext
from wml_ray.methods.losses import cross_entropies


class Independent(Method):
    """sum_i CE(z_i, y)."""

    def losses(self, outputs: Outputs, targets_B: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The cross-entropies. The gradients of peers that share a copy add up there."""
        return {"labels": cross_entropies(outputs["logits_MBK"], targets_B).sum()}
