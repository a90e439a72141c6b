"""What methods see of a tree besides the logits: the maps between stages, and the feature of each peer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Features(NamedTuple):
    """The tensors of one forward pass of a tree. With own views, a copy's map holds the views of its peers."""

    maps: list[list[Tensor]]  # maps[s][c]: output of copy c of stage s, (B, C, H, W); the last stage is left out
    pooled: list[Tensor]  # of each peer, (B, d_i): what enters the layer that gives its logits, averaged over positions
    logits_MBK: Tensor


def pooled_and_logits(head: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The feature (B, d) and the logits of a last stage, run once; the logits are those of `head(inputs)`.

    The layer that gives the logits is found from `head` by the last child with parameters of each nested
    `nn.Sequential`. Of a head that is anything else, the feature is its input.
    """
    entering, logits = _entering_and_outputs(head, inputs)
    return mean_over_positions(entering), logits


def mean_over_positions(values: Tensor) -> Tensor:
    """The mean (B, C) over the positions of maps (B, C, H, W) or tokens (B, N, C); (B, C) stays as it is."""
    if values.dim() == 3:
        return values.mean(1)
    return values.flatten(2).mean(2) if values.dim() > 3 else values


def _entering_and_outputs(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    if type(module).forward is not nn.Sequential.forward or not list(module.parameters()):
        return inputs, module(inputs)
    children = list(module.children())
    last = max(index for index, child in enumerate(children) if list(child.parameters()))
    for child in children[:last]:
        inputs = child(inputs)
    entering, outputs = _entering_and_outputs(children[last], inputs)
    for child in children[last + 1 :]:
        outputs = child(outputs)
    return entering, outputs
