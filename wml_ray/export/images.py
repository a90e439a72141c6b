"""Images as a user has them, made into the pixels that a network was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from wml_ray.config.schema import DataConfig
from wml_ray.data.images import decoded, read_image
from wml_ray.data.readers import DATASETS
from wml_ray.data.streamed import evaluation_transform
from wml_ray.errors import UserError
from wml_ray.networks.spec import ImageSpec

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Image: TypeAlias = "str | Path | PilImage | Tensor"


def pixels_of(image: Image, data: DataConfig, spec: ImageSpec) -> Tensor:
    """The pixels (C, H, W) of a path, a PIL image or a tensor, in the units in which the dataset stores them.

    Files and PIL images are rotated by their EXIF orientation, and resized and cropped as the images that the run was
    evaluated on. Tensors (C, H, W) are returned as they are.

    Raises:
        UserError: the file is missing or cannot be decoded, or the tensor has another shape.
    """
    if isinstance(image, Tensor):
        if tuple(image.shape) != spec.shape:
            raise UserError(f"an image has the shape {tuple(image.shape)}; as a tensor it must be {spec.shape}")
        return image
    rgb = read_image(str(image), data.max_pixels) if isinstance(image, (str, Path)) else decoded(image)
    if data.name not in DATASETS:
        cropped: Tensor = evaluation_transform(spec.resolution)(rgb)
        return cropped
    return _as_stored(rgb, DATASETS[data.name].white, spec)


def _as_stored(rgb: Tensor, white: int, spec: ImageSpec) -> Tensor:
    """An RGB image in the channels, size and range of values of a small dataset."""
    from torchvision.transforms import v2

    side = [spec.resolution, spec.resolution]
    pixels: Any = v2.functional.resize(rgb, side, antialias=True) if list(rgb.shape[1:]) != side else rgb
    if spec.channels == 1:
        pixels = v2.functional.rgb_to_grayscale(pixels)
    stored: Tensor = pixels if white == 255 else (pixels.float() * (white / 255)).round().to(torch.uint8)
    return stored
