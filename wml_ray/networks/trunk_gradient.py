"""Gradients of shared copies divided by the number of peers below them, as CL-ILR does (Song & Chai, NeurIPS 2018)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn

from wml_ray.networks.peer_tree import PeerTree


def divide_shared_gradients(tree: PeerTree) -> None:
    """Divide the gradient that enters a parameter by the number of peers that run through its copy, once and for all.

    A sum of M full losses trains a shared copy at M times the rate of a peer's own copies; the mean does not.
    """
    if tree.divides_gradients:
        return
    tree.divides_gradients = True
    names = dict(tree.named_parameters())
    for name, scale in gradient_scales(tree, names).items():
        if scale < 1.0 and names[name].requires_grad:
            names[name].register_hook(partial(_scaled, scale=scale))


def gradient_scales(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """The factor on the gradient of each parameter: 1, or 1 / peers through it after `divide_shared_gradients`."""
    if not isinstance(model, PeerTree) or not model.divides_gradients:
        return dict.fromkeys(names, 1.0)
    return {name: 1.0 / len(model.peers_through(name)) for name in names}


def _scaled(gradient: Tensor, scale: float) -> Tensor:
    return gradient * scale
