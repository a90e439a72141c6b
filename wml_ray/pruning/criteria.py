"""Importance of channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wml_ray.networks.peer_tree import PeerTree, functional_forward
from wml_ray.pruning.channels import ChannelGroup


def saliency(tree: PeerTree, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """SNIP's |w * dL/dw| of every parameter (Lee et al. 2019), L the summed cross-entropy of all peers."""
    parameters = {name: p.detach().requires_grad_() for name, p in tree.named_parameters()}
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for inputs, targets in batches:
        loss = sum(F.cross_entropy(logits, targets) for logits in functional_forward(tree, parameters, inputs))
        assert isinstance(loss, Tensor)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, found, strict=True):
            gradients[name] += gradient / len(batches)
    return {name: (p.detach() * gradients[name]).abs() for name, p in parameters.items()}


def score_groups(groups: Sequence[ChannelGroup], saliencies: Mapping[str, Tensor]) -> None:
    """Set I_f: the summed saliency of a filter's weights, averaged over the layers whose channels are tied."""
    for group in groups:
        scores = [
            saliencies[f"{name}.weight"].flatten(1).sum(1).cpu()[indices].sum(1)
            for name, side, indices in group.members
            if side == "out" and saliencies[f"{name}.weight"].dim() > 1
        ]
        group.importance = torch.stack(scores).mean(0)
        assert group.importance.isfinite().all(), f"saliency of {group.members[0][0]} is not finite"
