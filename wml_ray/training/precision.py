"""The floating-point type of a training, and forward passes in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from wml_ray.config.schema import Config

if TYPE_CHECKING:  # the first line of a run names the type before PyTorch is imported
    import torch
    from torch import Tensor, nn

    from wml_ray.methods.base import Outputs

CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # of CPUs that compute bfloat16 natively; the last is ARM's
AMPERE = 8  # first major compute capability of GPUs that do


def resolve_precision(precision: str, device: torch.device) -> str:
    """`precision`, or for `auto` bfloat16 where `device` computes it natively, else float32."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "bfloat16" if _native_flag() else "float32"
    import torch

    return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= AMPERE else "float32"


def describe_precision(config: Config) -> str:
    """The floating-point type of a run, and the reason where it is chosen, in words."""
    if config.optim.precision != "auto":
        return config.optim.precision
    if config.scale.gpu:
        return "bfloat16 on GPUs from Ampere on, else float32"
    native = " or ".join(CPU_FLAGS[:2])
    if config.scale.workers:
        return f"bfloat16 on CPUs with {native}, else float32"
    flag = _native_flag()
    return f"bfloat16 (the CPU has {flag})" if flag else f"float32 (the CPU has no {native})"


@cache
def _native_flag() -> str | None:
    """The first of CPU_FLAGS that this CPU has; None also where the system does not list them."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return next((flag for flag in CPU_FLAGS if flag in flags), None)


def forward(model: nn.Module, inputs: Tensor, precision: str) -> Outputs:
    """Outputs of a method (or of its wrapper) computed under autocast, returned in float32 or more."""
    import torch

    from wml_ray.methods.losses import at_least_float32

    with torch.autocast(inputs.device.type, getattr(torch, precision), enabled=precision != "float32"):
        outputs: Outputs = model(inputs)
    return {name: at_least_float32(tensor) for name, tensor in outputs.items()}
