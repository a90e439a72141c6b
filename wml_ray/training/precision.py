"""Forward passes in the precision of the config."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wml_ray.methods.base import Outputs
from wml_ray.methods.losses import at_least_float32


def forward(model: nn.Module, inputs: Tensor, precision: str) -> Outputs:
    """Outputs of a method (or of its wrapper) computed under autocast, returned in float32 or more."""
    with torch.autocast(inputs.device.type, getattr(torch, precision), enabled=precision != "float32"):
        outputs: Outputs = model(inputs)
    return {name: at_least_float32(tensor) for name, tensor in outputs.items()}
