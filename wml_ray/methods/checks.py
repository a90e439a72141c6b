"""What methods ask of a tree. Each error names the keys that mend it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from wml_ray.errors import UserError
from wml_ray.networks.peer_tree import PeerTree


def check_num_peers(tree: PeerTree, method: str, fewest: int, reason: str) -> None:
    """Check that a tree has at least `fewest` peers.

    Raises:
        UserError: it has fewer.
    """
    if tree.num_peers < fewest:
        raise UserError(
            f"method.name = {method} needs at least {fewest} peers, {reason}; model.sharing = {list(tree.sharing)} "
            f"has {tree.num_peers}; let its last entry be {fewest} or more"
        )


def check_shared_stage(tree: PeerTree, method: str, reason: str) -> None:
    """Check that all peers share the first stage.

    Raises:
        UserError: they share nothing.
    """
    if tree.shared_stages == 0:
        raise UserError(
            f"method.name = {method} needs a stage that all peers share, {reason}; model.sharing = "
            f"{list(tree.sharing)} shares none; let it begin with 1, such as [1, 1, 2, 4, 4]"
        )


def check_no_exits(tree: PeerTree, method: str, reason: str) -> None:
    """Check that the peers are not the exits of one network.

    Raises:
        UserError: they are.
    """
    if tree.exits:
        raise UserError(
            f"method.name = {method} cannot train exits, {reason}; model.exits = {list(tree.exits)}; set it to [] with "
            "model.sharing of a tree, or take another method"
        )


def check_maps(maps: Sequence[Tensor], method: str) -> None:
    """Check that maps are images of one size, (B, C, H, W).

    Raises:
        UserError: there is none, or they are of other shapes or of several sizes.
    """
    if not maps or maps[0].dim() != 4 or len({tensor.shape[2:] for tensor in maps}) > 1:
        shapes = [list(tensor.shape[1:]) for tensor in maps]
        raise UserError(
            f"method.name = {method} needs maps (channels, height, width) of one size before the last stage of "
            f"model.backbone; its are {shapes}; take another method or another backbone"
        )
