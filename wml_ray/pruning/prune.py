"""Pruning at initialisation: SNIP saliency -> how many channels each layer keeps -> a physically smaller tree.

Torch-Pruning (imported here alone) says which channels must move together; how many go, and which, is decided here.
The result is a plan of widths, plain data: the same tree cut to the same widths loads the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wml_ray.config.schema import PruningConfig
from wml_ray.errors import UserError
from wml_ray.networks.costs import BATCHNORM, CONV, WEIGHTED, LayerCost, layer_costs, width
from wml_ray.networks.peer_tree import PeerTree, copy_name
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.budget import PeerBudget
from wml_ray.pruning.channels import ChannelGroup, ChannelWidths, Side, channel_groups
from wml_ray.pruning.criteria import saliency, score_groups


def prune(
    tree: PeerTree, config: PruningConfig, spec: ImageSpec, batches: Sequence[tuple[Tensor, Tensor]]
) -> ChannelWidths:
    """Remove channels of `tree` in place so that each peer loses at least its ratio, and return the plan.

    `batches` are the (inputs, targets) the saliency is taken on. A peer overshoots its ratio by less than what the
    last channels removed are worth; copies shared with a peer of a smaller ratio keep what that peer keeps.

    Raises:
        UserError: a ratio that `min_channels`, `round_to` and the shared copies put out of reach.
    """
    if not any(config.ratios):
        return {}
    costs = layer_costs(tree, spec)
    heads = head_names(tree, costs, spec)
    groups = channel_groups(tree, heads, spec)
    score_groups(groups, saliency(tree, batches))
    for peer in sorted(range(tree.num_peers), key=lambda peer: config.ratios[peer]):
        PeerBudget(tree, peer, groups, costs, heads, config).fit()
    return _remove(tree, groups)


def apply_channel_widths(tree: PeerTree, plan: Mapping[str, Sequence[int]]) -> None:
    """Cut a freshly built tree to the widths of `plan`; its tensors are then for the caller to load.

    Raises:
        ValueError: the plan does not belong to this network.
    """
    modules = dict(tree.named_modules())
    for name, (out, into) in plan.items():
        module = modules.get(name)
        if not isinstance(module, (*WEIGHTED, *BATCHNORM)) or out > width(module, "out") or into > width(module, "in"):
            raise ValueError(f"the channel plan gives '{name}' {out} x {into} channels, which this network cannot have")
        _narrow(module, torch.arange(out), torch.arange(into))


def head_names(tree: PeerTree, costs: Mapping[str, LayerCost], spec: ImageSpec) -> list[str]:
    """The layers that give the logits: the last weighted layer to run in each copy of the last stage.

    Raises:
        UserError: that layer has not one output a class.
    """
    last_in_copy = {copy_name(name): name for name in costs if isinstance(tree.get_submodule(name), WEIGHTED)}
    heads = [last_in_copy.get(tree.path(peer)[-1], "") for peer in range(tree.num_peers)]
    for head in heads:
        if not head or costs[head].out != spec.num_classes:
            raise UserError(
                f"the last stage of model.backbone ends in {head or 'no weighted layer'}; it must end in a linear or "
                f"convolution layer with one output a class ({spec.num_classes})"
            )
    return heads


def _remove(tree: PeerTree, groups: Sequence[ChannelGroup]) -> ChannelWidths:
    modules = dict(tree.named_modules())
    stays: dict[tuple[str, Side], Tensor] = {}
    for group in groups:
        if group.kept is None or group.kept == group.size:
            continue
        removed = group.importance.argsort(descending=True, stable=True)[group.kept :]
        for name, side, indices in group.members:
            mask = stays.setdefault((name, side), torch.ones(width(modules[name], side), dtype=torch.bool))
            mask[indices[removed].flatten()] = False
    plan: ChannelWidths = {}
    for name, module in modules.items():
        if (name, "out") in stays or (name, "in") in stays:
            out = stays.get((name, "out"), torch.ones(width(module, "out"), dtype=torch.bool))
            into = stays.get((name, "in"), torch.ones(width(module, "in"), dtype=torch.bool))
            _narrow(module, out.nonzero().flatten(), into.nonzero().flatten())
            plan[name] = [width(module, "out"), width(module, "in")]
    return plan


def _narrow(module: nn.Module, out: Tensor, into: Tensor) -> None:
    """Keep the output channels `out` and the input channels `into` of one layer."""
    pairs = True  # whether the weight has an input side of its own
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
