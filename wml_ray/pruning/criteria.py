"""Importance of channels: the pruning criteria by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wml_ray.methods.base import Batch
from wml_ray.networks.peer_tree import PeerTree, functional_forward
from wml_ray.pruning.channels import ChannelGroup


def snip(tree: PeerTree, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """|w * dL/dw| of every parameter (SNIP, Lee et al. 2019), L the summed cross-entropy of all peers."""
    parameters = {name: p.detach().requires_grad_() for name, p in tree.named_parameters()}
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs, targets in batches:
        loss = sum(F.cross_entropy(logits, targets) for logits in functional_forward(tree, parameters, inputs))
        assert isinstance(loss, Tensor)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, found, strict=True):
            gradients[name] += gradient / len(batches)
    return {name: (p.detach() * gradients[name]).abs() for name, p in parameters.items()}


CRITERIA: dict[str, Callable[[PeerTree, Sequence[Batch]], dict[str, Tensor]]] = {"snip": snip}
"""Each gives the importance of every parameter by name, in the parameter's shape."""


def score_groups(groups: Sequence[ChannelGroup], saliencies: Mapping[str, Tensor]) -> None:
    """Set I_f of each group: the summed importance of a filter's weights, averaged over the layers tied to it.

    Of a head it is the mean over its filters, so that heads and channels compare.
    """
    for group in groups:
        scores = [
            saliencies[f"{name}.weight"].flatten(1).sum(1).cpu()[indices].mean(1)
            for name, side, indices in group.members
            if side == "out" and saliencies[f"{name}.weight"].dim() > 1
        ]
        group.importance = torch.stack(scores).mean(0)
        assert group.importance.isfinite().all(), f"saliency of {group.members[0][0]} is not finite"
