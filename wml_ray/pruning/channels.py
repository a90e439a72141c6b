"""Channels that must be pruned together, from Torch-Pruning's dependency graph. The only file that imports it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wml_ray.errors import UserError, one_line
from wml_ray.networks.costs import BATCHNORM, CONV, WEIGHTED, example, width
from wml_ray.networks.peer_tree import PeerTree, in_mode
from wml_ray.networks.spec import ImageSpec
from wml_ray.networks.transformer import Attention

Side = Literal["out", "in"]


@dataclass(eq=False)
class ChannelGroup:
    """Channels that are removed together: one residual stream, the width between two layers, or the heads of attention.

    What is removed at a time is a channel, or a head with all its channels.
    """

    size: int
    peers: frozenset[int]  # the peers that run through any member
    members: list[tuple[str, Side, Tensor]]  # module, side, indices there of each channel: (size, indices a channel)
    importance: Tensor = field(default_factory=lambda: torch.empty(0))  # I_f of each channel, (size,)
    kept: int | None = None  # channels that stay; None until decided

    @property
    def unit(self) -> int:
        """Channels of the first member that are removed at a time."""
        return self.members[0][2].shape[1]


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
    """The prunable channel groups of the whole tree; a group through anything but plain layers is left out.

    Raises:
        UserError: the layers cannot be traced, or no group is prunable.
    """
    torch_pruning = _torch_pruning()
    graph = torch_pruning.DependencyGraph()
    names = {module: name for name, module in tree.named_modules()}
    ignored = [tree.get_submodule(head) for head in heads]
    try:
        with in_mode(tree, training=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters outside plain layers, which are left whole here
            graph.build_dependency(
                tree,
                example(tree, spec),
                forward_fn=lambda model, images: model.logits(images),
                customized_pruners={Attention: _opaque_attention()},
                verbose=False,
            )
        traced = list(graph.get_all_groups(ignored_layers=ignored, root_module_types=list(WEIGHTED)))
    except Exception as error:  # Torch-Pruning raises many types; each means that it cannot trace this network
        raise UserError(f"model.backbone cannot be pruned: its layers cannot be traced ({one_line(error)})") from error
    found = [_channel_group(tree, graph, group, names) for group in traced]
    groups = [group for group in found if isinstance(group, ChannelGroup)]
    groups += [_heads(tree, name, layer) for layer, name in names.items() if isinstance(layer, Attention)]
    if not groups:
        obstacle = next((group for group in found if isinstance(group, str)), "no weighted layer but the last")
        raise UserError(f"model.backbone cannot be pruned: {obstacle} stands in the way; set pruning.ratios to 0")
    return groups


def _opaque_attention() -> Any:
    """Attention for Torch-Pruning: one layer, whose inner channels are no concern of the layers around it."""
    from torch_pruning.pruner.function import BasePruningFunc

    class OpaqueAttention(BasePruningFunc):  # type: ignore[misc]
        def get_out_channels(self, layer: Attention) -> int:
            return layer.proj.out_features

        def get_in_channels(self, layer: Attention) -> int:
            return layer.qkv.in_features

        def prune_out_channels(self, layer: Attention, idxs: Sequence[int]) -> Attention:
            raise NotImplementedError  # nothing is removed by Torch-Pruning

        prune_in_channels = prune_out_channels

    return OpaqueAttention()


def _heads(tree: PeerTree, name: str, layer: Attention) -> ChannelGroup:
    """The heads of an attention layer: their rows of `qkv` and their columns of `proj`."""
    heads, inner = layer.num_heads, layer.head_dim
    rows = torch.arange(3 * heads * inner).view(3, heads, inner).transpose(0, 1).flatten(1)
    columns = torch.arange(heads * inner).view(heads, inner)
    members: list[tuple[str, Side, Tensor]] = [(f"{name}.qkv", "out", rows), (f"{name}.proj", "in", columns)]
    return ChannelGroup(heads, tree.peers_through(name), members)


def _channel_group(tree: PeerTree, graph: Any, found: Any, names: Mapping[nn.Module, str]) -> ChannelGroup | str:
    """The group of `found`, or the layer that cannot be pruned."""
    size = len(found[0].idxs)
    members: list[tuple[str, Side, Tensor]] = []
    for item in found:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return next((name for name, parameter in tree.named_parameters() if parameter is module), "a parameter")
        if module not in names or not any(True for _ in module.parameters()):
            continue  # an addition, an activation, a pooling
        side: Side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        by_channel = torch.tensor(item.root_idxs).argsort(stable=True)
        if not _is_prunable(module) or len(by_channel) % size:
            return f"{names[module]} ({type(module).__name__})"
        if side == "out" and isinstance(module, WEIGHTED) and len(by_channel) != width(module, "out"):
            return f"{names[module]} ({type(module).__name__})"
        members.append((names[module], side, torch.tensor(item.idxs)[by_channel].view(size, -1)))
    peers = frozenset[int]().union(*(tree.peers_through(name) for name, _, _ in members))
    return ChannelGroup(size, peers, members)


def _is_prunable(module: nn.Module) -> bool:
    if isinstance(module, CONV) and module.groups > 1:
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, (*WEIGHTED, *BATCHNORM))
