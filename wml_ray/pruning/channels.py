"""Channels that must be pruned together, from Torch-Pruning's dependency graph. The only file that imports it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wml_ray.networks.costs import BATCHNORM, CONV, WEIGHTED, example, width
from wml_ray.networks.peer_tree import PeerTree, in_mode
from wml_ray.networks.spec import ImageSpec

Side = Literal["out", "in"]


@dataclass(eq=False)
class ChannelGroup:
    """Channels that are removed together: one residual stream, or the width between two layers."""

    size: int
    peers: frozenset[int]  # the peers that run through any member
    members: list[tuple[str, Side, Tensor]]  # module, side, indices there of each channel: (size, indices a channel)
    importance: Tensor = field(default_factory=lambda: torch.empty(0))  # I_f of each channel, (size,)
    kept: int | None = None  # channels that stay; None until decided


def _torch_pruning() -> Any:
    """Torch-Pruning, without timm: it imports that, which takes seconds, only to count MACs of its layers."""
    hidden = "timm" not in sys.modules
    if hidden:
        sys.modules["timm"] = None  # type: ignore[assignment]
    try:
        import torch_pruning
    finally:
        if hidden:
            del sys.modules["timm"]
    return torch_pruning


def channel_groups(tree: PeerTree, heads: Sequence[str], spec: ImageSpec) -> list[ChannelGroup]:
    """The prunable channel groups of the whole tree; a group through anything but plain layers is left out."""
    torch_pruning = _torch_pruning()
    graph = torch_pruning.DependencyGraph()
    with in_mode(tree, training=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside plain layers, which are left whole here
        graph.build_dependency(
            tree, example(tree, spec), forward_fn=lambda model, images: model.logits(images), verbose=False
        )
    names = {module: name for name, module in tree.named_modules()}
    ignored = [tree.get_submodule(head) for head in heads]
    found = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(WEIGHTED))
    groups = (_channel_group(tree, graph, group, names) for group in found)
    return [group for group in groups if group is not None]


def _channel_group(tree: PeerTree, graph: Any, found: Any, names: Mapping[nn.Module, str]) -> ChannelGroup | None:
    size = len(found[0].idxs)
    members: list[tuple[str, Side, Tensor]] = []
    for item in found:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return None
        if module not in names or not any(True for _ in module.parameters()):
            continue  # an addition, an activation, a pooling
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        by_channel = torch.tensor(item.root_idxs).argsort(stable=True)
        if not _is_prunable(module) or len(by_channel) % size:
            return None
        if side == "out" and isinstance(module, WEIGHTED) and len(by_channel) != width(module, "out"):
            return None
        members.append((names[module], side, torch.tensor(item.idxs)[by_channel].view(size, -1)))
    peers = frozenset[int]().union(*(tree.peers_through(name) for name, _, _ in members))
    return ChannelGroup(size, peers, members)


def _is_prunable(module: nn.Module) -> bool:
    if isinstance(module, CONV) and module.groups > 1:
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, (*WEIGHTED, *BATCHNORM))
