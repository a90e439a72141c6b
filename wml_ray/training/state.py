"""The state of a trainer as named tensors, as `trainer.safetensors` stores it.

Batch order, augmentation, dropout and learning rate follow from seed and step, so they need no state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wml_ray.methods.base import Method


def initial_state(method: Method) -> dict[str, Tensor]:
    """The state before the first step: the method's own tensors, and no momentum."""
    return {**prefixed("method", method.own_state()), "epoch": torch.tensor(0), "step": torch.tensor(0)}


def load_method(method: Method, model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy the deployed tree's tensors `model` and the method's own tensors in `state` into `method`.

    Raises:
        RuntimeError: a tensor is missing, unknown, or has another shape.
    """
    method.load_state_dict(prefixed(method.deploys, model, ".") | below("method", state))


def optimizer_state(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`optimizer/<key>/<parameter>`; the tree's parameters are named as in `model.safetensors`."""
    return {
        f"optimizer/{key}/{name}": torch.as_tensor(value)
        for name, parameter in named_parameters(method).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimizer(method: Method, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Put the `optimizer/` tensors of `state` into a new optimiser."""
    parameters = named_parameters(method)
    for name, value in below("optimizer", state).items():
        key, _, parameter_name = name.partition("/")
        parameter = parameters[parameter_name]
        if value.shape == parameter.shape:  # in the parameter's own memory layout, without which a step is slower
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value.detach()


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """`scaler/<key>`; empty for a disabled scaler."""
    return {f"scaler/{key}": torch.tensor(value, dtype=torch.float64) for key, value in scaler.state_dict().items()}


def load_scaler(scaler: torch.amp.GradScaler, state: Mapping[str, Tensor]) -> None:
    """Put the `scaler/` tensors of `state` into `scaler`."""
    values = {key: float(value) for key, value in below("scaler", state).items()}
    if values:
        counts = {key: int(values[key]) for key in ("growth_interval", "_growth_tracker")}
        scaler.load_state_dict({**values, **counts})


def prefixed(prefix: str, tensors: Mapping[str, Tensor], separator: str = "/") -> dict[str, Tensor]:
    """The tensors under the names `<prefix><separator><name>`."""
    return {f"{prefix}{separator}{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named `<prefix>/<name>`, by name."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def named_parameters(method: Method) -> dict[str, Tensor]:
    """The method's parameters; those of the tree are named as in `model.safetensors`."""
    return {name.removeprefix("tree."): parameter for name, parameter in method.named_parameters()}
