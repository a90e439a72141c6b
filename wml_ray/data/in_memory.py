"""A small dataset: one tensor on the training device, augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset, NumberedBatches, view_keys
from wml_ray.data.splits import Split, generator_for
from wml_ray.distributed import WorkerRank
from wml_ray.methods.base import Batch
from wml_ray.networks.spec import ImageSpec


class InMemoryDataset(Dataset):
    """All images as one uint8 tensor on the training device."""

    def __init__(
        self,
        config: Config,
        spec: ImageSpec,
        splits: dict[Split, Tensor],
        images: Tensor,
        labels: Tensor,
        device: torch.device,
    ) -> None:
        super().__init__(config, spec, splits, device)
        self.mean, self.std = _channel_statistics(images[splits["train"]])
        self.images, self.labels = images.to(device), labels.to(device)

    def pixels(self, indices: Tensor) -> Batch:
        indices = indices.to(self.device)
        return self.images[indices], self.labels[indices]

    def _plain(self, indices: Tensor) -> Batch:
        images, labels = self.pixels(indices)
        return self._normalised(images), labels

    def _augmented(
        self, batches: NumberedBatches, key: tuple[object, ...], worker: WorkerRank, views: int = 1
    ) -> Iterator[Batch]:
        for step, indices in batches:
            inputs, targets = self._plain(worker.share_of(indices))
            generators = (generator_for(self.config.seed, *drawn_from) for drawn_from in view_keys(key, step, views))
            draws = (_SharedDraws(len(indices), generator, worker, self.device) for generator in generators)
            augmented = [self._augment(inputs, view) for view in draws]
            yield augmented[0] if views == 1 else torch.cat(augmented), targets

    def _augment(self, images: Tensor, draws: _SharedDraws) -> Tensor:
        """Crop, flip and cut out. Padding and cutout fill with 0, the mean of normalised images."""
        data = self.config.data
        if data.crop_padding:
            images = _random_crop(images, data.crop_padding, draws)
        if data.flip:
            images = torch.where(draws.integers(2).view(-1, 1, 1, 1) == 1, images.flip(-1), images)
        if data.cutout:
            images = _cutout(images, data.cutout, draws)
        if self.config.optim.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of each channel of uint8 images, from a histogram."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    means = shares @ levels
    deviations = ((levels - means[:, None]) ** 2 * shares).sum(1).sqrt().clamp_min(1e-8)
    return tuple(means.tolist()), tuple(deviations.tolist())


class _SharedDraws:
    """Random integers drawn for a whole global batch, of which a worker uses its share.

    Every worker draws the same numbers, so the augmentation does not depend on the number of workers.
    """

    def __init__(self, batch: int, generator: torch.Generator, worker: WorkerRank, device: torch.device) -> None:
        self.batch, self.generator, self.worker, self.device = batch, generator, worker, device

    def integers(self, end: int) -> Tensor:
        """One integer in [0, end) for each image of this worker's share."""
        values = torch.randint(end, (self.batch,), generator=self.generator)
        return self.worker.share_of(values).to(self.device)


def _random_crop(images: Tensor, padding: int, draws: _SharedDraws) -> Tensor:
    side = images.shape[-1]
    padded = F.pad(images, [padding] * 4)
    span = torch.arange(side, device=images.device)
    rows, columns = (draws.integers(2 * padding + 1)[:, None] + span for _ in range(2))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor, size: int, draws: _SharedDraws) -> Tensor:
    """Set one square an image to 0 (DeVries & Taylor 2017). Its centre is in the image; its border may be outside."""
    side = images.shape[-1]
    span = torch.arange(side, device=images.device)
    rows, columns = (span - draws.integers(side)[:, None] + size // 2 for _ in range(2))
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return images.masked_fill(inside[:, None], 0.0)
