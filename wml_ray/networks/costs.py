"""The cost of each layer of a network, in parameters and multiply-accumulates (MACs), at any width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wml_ray.networks.peer_tree import PeerTree, copy_name, in_mode
from wml_ray.networks.spec import ImageSpec

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WEIGHTED = (*CONV, nn.Linear)


@dataclass(frozen=True)
class LayerCost:
    """One convolution, linear or BatchNorm layer at its full widths."""

    out: int  # output channels
    into: int  # input channels
    weights: int  # weights per (input, output) pair of channels; per output channel if grouped
    params_per_out: int  # biases, and BatchNorm's scale and shift
    positions: int  # output positions, H * W of a convolution; 0 for BatchNorm, whose MACs are not counted
    grouped: bool

    def params(self, out: int, into: int) -> int:
        """Parameters with `out` output and `into` input channels."""
        return self._pairs(out, into) * self.weights + self.params_per_out * out

    def macs(self, out: int, into: int) -> int:
        """MACs of one image with `out` output and `into` input channels."""
        return self._pairs(out, into) * self.weights * self.positions

    def _pairs(self, out: int, into: int) -> int:
        return out if self.grouped else out * into


def layer_costs(network: nn.Module, spec: ImageSpec) -> dict[str, LayerCost]:
    """Costs by module name, in the order in which the layers run, from one forward pass of one black image."""
    names = {module: name for name, module in network.named_modules()}
    costs: dict[str, LayerCost] = {}

    def record(module: nn.Module, _: object, output: Tensor) -> None:
        costs[names[module]] = _cost(module, output)

    layers = [module for module in network.modules() if isinstance(module, (*WEIGHTED, *BATCHNORM))]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.no_grad(), in_mode(network, training=False):
            network(example(network, spec))
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def example(network: nn.Module, spec: ImageSpec, images: int = 1) -> Tensor:
    """Black images on the network's device, (images, C, H, W)."""
    parameter = next(network.parameters())
    return torch.zeros(images, *spec.shape, device=parameter.device, dtype=parameter.dtype)


def width(module: nn.Module, side: str) -> int:
    """Channels of a convolution, linear or BatchNorm layer on its "out" or "in" side."""
    if isinstance(module, CONV):
        return module.out_channels if side == "out" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    assert isinstance(module, BATCHNORM)
    return module.num_features


def count_params(network: nn.Module) -> int:
    """Parameters of `network`."""
    return sum(p.numel() for p in network.parameters())


def count_macs(network: nn.Module, spec: ImageSpec) -> int:
    """MACs of one image through the convolutions and linear layers of `network`."""
    return sum(cost.macs(cost.out, cost.into) for cost in layer_costs(network, spec).values())


def _cost(module: nn.Module, output: Tensor) -> LayerCost:
    out, into = width(module, "out"), width(module, "in")
    if isinstance(module, BATCHNORM):
        return LayerCost(out, into, 0, 2 if module.affine else 0, 0, grouped=True)
    weight = module.weight
    assert isinstance(weight, Tensor)
    grouped = isinstance(module, CONV) and module.groups > 1
    weights = weight.numel() // (out if grouped else out * into)
    positions = output.numel() // (output.shape[0] * out)
    return LayerCost(out, into, weights, int(module.bias is not None), positions, grouped)


def peer_costs(tree: PeerTree, spec: ImageSpec) -> list[dict[str, int]]:
    """Channels (of all layers but the head), parameters and MACs an image of each peer."""
    layers = layer_costs(tree, spec)
    costs = []
    for index in range(tree.num_peers):
        path = tree.path(index)
        weighted = [cost for name, cost in layers.items() if cost.positions and copy_name(name) in path]
        macs = sum(cost.macs(cost.out, cost.into) for cost in weighted)
        channels = sum(cost.out for cost in weighted[:-1])
        params = sum(count_params(tree.get_submodule(name)) for name in path)
        costs.append({"channels": channels, "params": params, "macs": macs})
    return costs


def removed_shares(full: list[dict[str, int]], now: list[dict[str, int]]) -> list[dict[str, float]]:
    """The costs `now` of each peer, and `<unit>_drop`, the share of the costs `full` that was removed."""
    return [
        {**costs, **{f"{unit}_drop": (whole[unit] - costs[unit]) / max(whole[unit], 1) for unit in whole}}
        for whole, costs in zip(full, now, strict=True)
    ]
