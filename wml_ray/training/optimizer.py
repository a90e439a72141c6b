"""Optimiser and learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from wml_ray.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of training step `step` (from 0), a function of the step alone, so that it needs no state."""
    total = config.epochs * steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    if config.schedule == "onecycle":  # Smith & Topin 2019: up over the warm-up (30 % by default), then down
        top = max((warmup or 0.3 * total) - 1, 1e-9)
        start, end = config.learning_rate / 25, config.learning_rate / 25e4
        if step < top:
            return _cosine(start, config.learning_rate, step / top)
        return _cosine(config.learning_rate, end, (step - top) / max(total - 1 - top, 1e-9))
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return _cosine(config.learning_rate, 0.0, (step - warmup) / (total - warmup))
    if config.schedule == "multistep":
        decays = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return config.learning_rate * config.decay_factor**decays
    return config.learning_rate


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def make_optimizer(config: OptimConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all parameters of `module` that require a gradient."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        weight_decay=config.weight_decay,
    )
