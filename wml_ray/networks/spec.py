"""The images a backbone is built for, and the type of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # the size of images is known without torch, whose import takes seconds
    from torch import nn

Stages: TypeAlias = "dict[str, nn.Module]"


@dataclass(frozen=True)
class ImageSpec:
    """Input channels, side of the square images in pixels, and number of classes K."""

    channels: int
    resolution: int
    num_classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.channels, self.resolution, self.resolution)
