"""Pruning at initialisation: importance of channels -> number of channels each layer keeps -> a smaller tree.

Torch-Pruning finds the channels that must be removed together; which of them are removed is decided here. The result is
the widths of the layers, plain data: the same tree cut to the same widths loads the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from wml_ray.config.schema import PruningConfig
from wml_ray.errors import UserError, one_line
from wml_ray.methods.base import Batch
from wml_ray.networks.costs import WEIGHTED, LayerCost, example, layer_costs
from wml_ray.networks.peer_tree import PeerTree, copy_name, in_mode
from wml_ray.networks.spec import ImageSpec
from wml_ray.pruning.budget import PeerBudget
from wml_ray.pruning.channels import channel_groups
from wml_ray.pruning.criteria import CRITERIA, score_groups
from wml_ray.pruning.widths import ChannelWidths, remove_channels


def prune(tree: PeerTree, config: PruningConfig, spec: ImageSpec, batches: Sequence[Batch]) -> ChannelWidths:
    """Remove channels of `tree` in place so that each peer loses at least its ratio; returns the new widths.

    The importance of channels is measured on the (inputs, targets) pairs of `batches`. A peer loses more than its ratio
    by less than the last removed channels; copies shared with a peer of a smaller ratio keep the channels of that peer.

    Raises:
        UserError: a ratio is out of reach with `min_channels`, `round_to` and the shared copies.
    """
    if not any(config.ratios):
        return {}
    costs = layer_costs(tree, spec)
    heads = head_names(tree, costs, spec)
    groups = channel_groups(tree, heads, spec)
    score_groups(groups, CRITERIA["snip"](tree, batches))
    for peer in sorted(range(tree.num_peers), key=lambda peer: config.ratios[peer]):
        PeerBudget(tree, peer, groups, costs, heads, config).fit()
    widths = remove_channels(tree, groups)
    _check_that_it_runs(tree, spec)
    return widths


def _check_that_it_runs(tree: PeerTree, spec: ImageSpec) -> None:
    """Run the pruned tree once.

    Raises:
        UserError: a layer has other widths than the layers around it.
    """
    names = {module: name for name, module in tree.named_modules()}
    running: list[str] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: running.append(names[module])) for module in names]
    try:
        with torch.no_grad(), in_mode(tree, training=False):
            tree.logits(example(tree, spec))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"model.backbone cannot be pruned: {running[-1]} stands in the way, as its channels depend on "
            f"others in a way that cannot be traced ({one_line(error)})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def head_names(tree: PeerTree, costs: Mapping[str, LayerCost], spec: ImageSpec) -> list[str]:
    """Names of the layers that give the logits: the last weighted layer that runs in each copy of the last stage.

    Raises:
        UserError: the number of outputs of that layer is not the number of classes.
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
