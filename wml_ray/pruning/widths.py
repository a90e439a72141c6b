"""Layers cut to fewer channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wml_ray.networks.costs import BATCHNORM, CONV, WEIGHTED, width
from wml_ray.networks.peer_tree import PeerTree
from wml_ray.pruning.channels import ChannelGroup, Side

ChannelWidths = dict[str, list[int]]
"""Module name -> [output width, input width] of each module whose width changes."""


def apply_channel_widths(tree: PeerTree, widths: Mapping[str, Sequence[int]]) -> None:
    """Cut a freshly built tree to `widths`, in place; the caller then loads its tensors.

    Raises:
        ValueError: the widths do not belong to this network.
    """
    modules = dict(tree.named_modules())
    for name, (out, into) in widths.items():
        module = modules.get(name)
        if not isinstance(module, (*WEIGHTED, *BATCHNORM)) or out > width(module, "out") or into > width(module, "in"):
            raise ValueError(f"the channel plan gives '{name}' {out} x {into} channels, which this network cannot have")
        _narrow(module, torch.arange(out), torch.arange(into))


def remove_channels(tree: PeerTree, groups: Sequence[ChannelGroup]) -> ChannelWidths:
    """Remove the least important channels of each group in place until `group.kept` stay; returns the new widths."""
    modules = dict(tree.named_modules())
    kept: dict[tuple[str, Side], Tensor] = {}
    for group in groups:
        if group.kept is None or group.kept == group.size:
            continue
        removed = group.importance.argsort(descending=True, stable=True)[group.kept :]
        for name, side, indices in group.members:
            mask = kept.setdefault((name, side), torch.ones(width(modules[name], side), dtype=torch.bool))
            mask[indices[removed].flatten()] = False
    widths: ChannelWidths = {}
    for name, module in modules.items():
        if (name, "out") in kept or (name, "in") in kept:
            out = kept.get((name, "out"), torch.ones(width(module, "out"), dtype=torch.bool))
            into = kept.get((name, "in"), torch.ones(width(module, "in"), dtype=torch.bool))
            _narrow(module, out.nonzero().flatten(), into.nonzero().flatten())
            widths[name] = [width(module, "out"), width(module, "in")]
    return widths


def _narrow(module: nn.Module, out: Tensor, into: Tensor) -> None:
    """Keep the output channels `out` and the input channels `into` of one layer."""
    pairs = True  # the weight has an input side
    if isinstance(module, BATCHNORM):
        module.num_features, pairs = len(out), False
    elif isinstance(module, CONV) and module.groups > 1:
        module.out_channels = module.in_channels = module.groups = len(out)
        pairs = False
    elif isinstance(module, CONV):
        module.out_channels, module.in_channels = len(out), len(into)
    else:
        assert isinstance(module, nn.Linear)
        module.out_features, module.in_features = len(out), len(into)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        kept = tensor.detach()[out.to(tensor.device)]
        if pairs and name == "weight":
            kept = kept[:, into.to(tensor.device)]
        kept = kept.contiguous()
        setattr(module, name, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)
