"""Spatial attention of maps, and decoders of maps to those of earlier stages (FFSD, arXiv 2103.14473).

Attention is the mean over channels, so networks of any widths have attention of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from wml_ray.methods.losses import at_least_float32


def attention(maps_BCHW: Tensor) -> Tensor:
    """Mean square over channels at each of the N = H W positions, (B, N)."""
    return at_least_float32(maps_BCHW).square().mean(1).flatten(1)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two tensors (B, ...), each image's scaled to length 1; shape ()."""
    return F.mse_loss(F.normalize(one.flatten(1)), F.normalize(other.flatten(1)))


def diversity(own_BN: Tensor, other_BN: Tensor) -> Tensor:
    """Mean squared difference of attention, scaled to length 1, from the shifted one of another network; shape ()."""
    return F.mse_loss(F.normalize(own_BN), shifted(other_BN))


def shifted(attention_BN: Tensor) -> Tensor:
    """Attention whose high entries are turned over: |a| - u where u = a / |a| is above its lowest third, else u.

    At the highest entry of the lowest third it is |a| / 2. As in the public code, lengths |a| and scaled entries are
    added as they are.
    """
    length_B1 = attention_BN.norm(dim=1, keepdim=True)
    unit_BN = F.normalize(attention_BN)
    lowest_third = max(unit_BN.shape[1] // 3, 1)
    threshold_B1 = unit_BN.kthvalue(lowest_third, dim=1, keepdim=True).values
    half_B1: Tensor = length_B1 / 2
    return (half_B1 - unit_BN) * (unit_BN - threshold_B1).sign() + half_B1


def with_shift(maps_BCHW: Tensor, attention_BN: Tensor) -> Tensor:
    """Maps to which the shift of `attention_BN` is added at each position, times its length over the channels C."""
    length_B1 = attention_BN.norm(dim=1, keepdim=True)
    shift_BN: Tensor = (shifted(attention_BN) - F.normalize(attention_BN)) * length_B1 / maps_BCHW.shape[1]
    return maps_BCHW + shift_BN.view(-1, 1, *maps_BCHW.shape[2:])


class Decoder(nn.Module):
    """A last map to the maps of the stages before it: a transposed 3x3 convolution, BatchNorm and ReLU for each."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        """`shapes` are those of the maps, (C, H, W), from the last stage up."""
        super().__init__()
        self.steps = nn.ModuleList(_Step(below, above) for below, above in pairwise(shapes))

    def forward(self, maps_BCHW: Tensor, frozen: bool = False) -> list[Tensor]:
        """The maps decoded from a last map, from the stage before it up; `frozen` normalises by running statistics."""
        decoded = []
        for step in self.steps:
            maps_BCHW = step(maps_BCHW, frozen)
            decoded.append(maps_BCHW)
        return decoded


class _Step(nn.Module):
    def __init__(self, below: Sequence[int], above: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(above[1:])
        strides = [-(-size // size_below) for size, size_below in zip(above[1:], below[1:], strict=True)]
        padding = [stride - 1 for stride in strides]
        self.convolution = nn.ConvTranspose2d(below[0], above[0], 3, strides, 1, padding, bias=False)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(above[0])

    def forward(self, maps_BCHW: Tensor, frozen: bool) -> Tensor:
        height, width = self.size
        maps_BCHW, norm = self.convolution(maps_BCHW)[..., :height, :width], self.norm
        if frozen:
            statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
            return F.batch_norm(maps_BCHW, *statistics, eps=norm.eps).relu()
        return F.relu(norm(maps_BCHW))
