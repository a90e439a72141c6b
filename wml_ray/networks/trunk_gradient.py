"""The gradient of copies that several peers share."""

from __future__ import annotations

from functools import partial
from weakref import WeakSet

from torch import Tensor

from wml_ray.networks.peer_tree import PeerTree

_DIVIDED: WeakSet[PeerTree] = WeakSet()


def divide_shared_gradients(tree: PeerTree) -> None:
    """Divide every gradient of a copy that n peers share by n, by hooks on its parameters; a second call does nothing.

    As each copy adds the gradients of the peers below it, this equals scaling them where the copy's output is used
    (Song and Chai, NeurIPS 2018, backpropagation rescaling). Gradients of functional calls are not divided, as these
    are by other tensors.
    """
    if tree in _DIVIDED:
        return
    _DIVIDED.add(tree)
    for name, parameter in tree.named_parameters():
        num_peers = len(tree.peers_through(name))
        if num_peers > 1:
            parameter.register_hook(partial(_divided, num_peers=num_peers))


def _divided(gradient: Tensor, num_peers: int) -> Tensor:
    return gradient / num_peers
