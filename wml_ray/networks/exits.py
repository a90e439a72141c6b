"""Exits of one network as peers: heads after early stages (Zhang et al., ICCV 2019, "Be Your Own Teacher")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from wml_ray.errors import UserError
from wml_ray.networks.costs import example
from wml_ray.networks.peer_tree import PeerTree, in_mode
from wml_ray.networks.spec import ImageSpec


def exit_tree(
    build: Callable[[], Mapping[str, nn.Module]], sharing: Sequence[int], exits: Sequence[int], spec: ImageSpec
) -> PeerTree:
    """The tree whose peer i runs the first `exits[i]` stages that `build` returns, and then a head of its own.

    The head after all stages but the last is the last stage; one after fewer is an `exit_head`. Stages that no peer
    runs through are left out.

    Raises:
        UserError: the number of entries of `sharing` is not the number of stages, or a map is not (C, H, W).
    """
    tree = PeerTree(build, sharing, exits)
    *body, last = tree.stages
    maps = _maps(tree, body, spec)
    heads = tree.stages[last]
    assert isinstance(heads, nn.ModuleList)
    for peer, stages in enumerate(exits):
        if stages < len(body):
            heads[peer] = exit_head(maps[stages - 1], maps[-1], spec.num_classes)
    for name in body[exits[-1] :]:
        del tree.stages[name]
    tree.sharing = (*tree.sharing[: exits[-1]], tree.sharing[-1])
    return tree


def exit_head(early: Tensor, last: Tensor, num_classes: int) -> nn.Sequential:
    """A map as `early` to logits: separable 3x3 convolutions to the size and width of `last`, pooling, linear.

    Each has stride 2, and doubles the width at most, until the size is that of `last`.
    """
    side, width = early.shape[2], early.shape[1]
    layers: list[nn.Module] = []
    while not layers or side > last.shape[2]:
        stride = 2 if side > last.shape[2] else 1
        side = -(-side // stride)
        out = last.shape[1] if side <= last.shape[2] else min(2 * width, last.shape[1])
        layers += [nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


@torch.no_grad()
def _maps(tree: PeerTree, body: Sequence[str], spec: ImageSpec) -> list[Tensor]:
    """The maps of one black image after each stage but the last."""
    maps = [example(tree, spec)]
    with in_mode(tree, training=False):
        for name in body:
            maps.append(tree.get_submodule(f"stages.{name}.0")(maps[-1]))
    if any(tensor.dim() != 4 for tensor in maps):
        raise UserError(
            "model.exits needs maps (channels, height, width) after each stage but the last of model.backbone; its "
            f"are {[list(tensor.shape[1:]) for tensor in maps[1:]]}; set model.exits to [], or take another backbone"
        )
    return maps[1:]
