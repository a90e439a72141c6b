"""Splits of a dataset, and batches that are a function of seed, epoch and step alone.

Small sets live as tensors on the training device and are augmented in whole batches; image folders stream through
loader processes. A worker takes its share of every global batch, so the number of workers changes no batch.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wml_ray.backbones import ImageSpec
from wml_ray.config import Config, UserError
from wml_ray.readers import SPECS, image_folder, read_images

Batch = tuple[Tensor, Tensor]
NumberedBatches = Iterable[tuple[int, Tensor]]  # step of the epoch, indices
Split = Literal["train", "outer", "validation", "test"]

DIGITS_TEST_FRACTION = 0.2
SALIENCY_BATCH = 64  # images at most in a pass of the whole unpruned tree
EVAL_BATCH = 512  # images a worker evaluates at once
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Shard:
    """Which worker this is among how many."""

    rank: int = 0
    world_size: int = 1

    def of(self, values: Tensor) -> Tensor:
        """This worker's share of a global batch; shares differ by at most one image."""
        return values.tensor_split(self.world_size)[self.rank]


def seed_for(*parts: object) -> int:
    """A 63-bit seed from any words and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_for(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(*parts))


def load(config: Config, device: torch.device | str = "cpu") -> Dataset:
    """The dataset of `config`, resident on `device` where it is small.

    Raises:
        UserError: the folder is missing or broken, the download failed, or a split would be empty.
    """
    if config.data.name == "imagefolder":
        return StreamedDataset.from_folder(config, torch.device(device))
    images, labels, num_train = read_images(config.data)
    splits = _splits(config, num_train, torch.arange(num_train, len(labels)))
    return ResidentDataset(config, SPECS[config.data.name], splits, images, labels, torch.device(device))


class Dataset(ABC):
    """Batches of one dataset. Inputs come normalised, (B, C, H, W) float32 on the training device; targets (B,)."""

    mean: tuple[float, ...]  # of each channel, in the units the images are stored in
    std: tuple[float, ...]

    def __init__(self, config: Config, spec: ImageSpec, splits: dict[Split, Tensor], device: torch.device) -> None:
        self.config, self.spec, self.splits, self.device = config, spec, splits, device
        self.batch_size = config.data.batch_size
        if len(splits["train"]) < self.batch_size:
            raise UserError(
                f"data.batch_size = {self.batch_size} is more than the {len(splits['train'])} training images of "
                f"{config.data.name}; make it smaller"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in the training split; what is left over waits for another epoch's order."""
        return len(self.splits["train"]) // self.batch_size

    def train_batches(self, epoch: int, shard: Shard, first: int = 0) -> Iterator[Batch]:
        """This worker's share of each batch of an epoch from the `first` on, in an order drawn from seed and epoch."""
        order = self._shuffled("train", epoch)[: self.steps_per_epoch * self.batch_size]
        batches = enumerate(order.split(self.batch_size))
        return self._augmented(itertools.islice(batches, first, None), ("train", epoch), shard)

    def outer_batches(self, epoch: int, shard: Shard, first: int = 0) -> Iterator[Batch]:
        """Endless batches for the outer loss, augmented as training batches are, in an order of their own."""
        size = min(self.batch_size, len(self.splits["outer"]))
        orders = (self._shuffled("outer", (epoch, lap)) for lap in itertools.count())
        batches = enumerate(batch for order in orders for batch in order.split(size) if len(batch) == size)
        return self._augmented(itertools.islice(batches, first, None), ("outer", epoch), shard)

    def saliency_batches(self, images: int) -> list[Batch]:
        """Batches of altogether `images` training images, drawn by the seed, not augmented."""
        order = self._shuffled("train", "saliency")[:images]
        return [self._plain(indices) for indices in order.tensor_split(-(-len(order) // SALIENCY_BATCH))]

    def evaluation_batches(self, split: Split, shard: Shard) -> Iterator[Batch]:
        """This worker's share of a split, in order and without augmentation."""
        for indices in shard.of(self.splits[split]).split(EVAL_BATCH):
            if len(indices):
                yield self._plain(indices)

    def _shuffled(self, split: Split, key: object) -> Tensor:
        indices = self.splits[split]
        return indices[torch.randperm(len(indices), generator=generator_for(self.config.seed, split, key))]

    @abstractmethod
    def _augmented(self, batches: NumberedBatches, key: tuple[object, ...], shard: Shard) -> Iterator[Batch]:
        """This worker's share of each global batch of indices, with augmentation drawn from (seed, key, step)."""

    @abstractmethod
    def _plain(self, indices: Tensor) -> Batch: ...

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, kept on the device: a copy a batch would hold up a GPU's queue."""
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def _normalised(self, images: Tensor) -> Tensor:
        mean_C11, std_C11 = self._statistics
        normalised = (images - mean_C11) / std_C11
        if self.config.optim.channels_last:
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        return normalised


class ResidentDataset(Dataset):
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

    def _plain(self, indices: Tensor) -> Batch:
        indices = indices.to(self.device)
        return self._normalised(self.images[indices].float()), self.labels[indices]

    def _augmented(self, batches: NumberedBatches, key: tuple[object, ...], shard: Shard) -> Iterator[Batch]:
        for step, indices in batches:
            inputs, targets = self._plain(shard.of(indices))
            draws = _Draws(len(indices), generator_for(self.config.seed, *key, step), shard, self.device)
            yield self._augment(inputs, draws), targets

    def _augment(self, images: Tensor, draws: _Draws) -> Tensor:
        """Zero after normalisation is the mean, so padding and cutout fill with the mean image value."""
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


class _Draws:
    """Random integers for a global batch, of which a worker keeps its share."""

    def __init__(self, batch: int, generator: torch.Generator, shard: Shard, device: torch.device) -> None:
        self.batch, self.generator, self.shard, self.device = batch, generator, shard, device

    def integers(self, end: int) -> Tensor:
        values = torch.randint(end, (self.batch,), generator=self.generator)
        return self.shard.of(values).to(self.device)


def _random_crop(images: Tensor, padding: int, draws: _Draws) -> Tensor:
    side = images.shape[-1]
    padded = F.pad(images, [padding] * 4)
    span = torch.arange(side, device=images.device)
    rows, columns = (draws.integers(2 * padding + 1)[:, None] + span for _ in range(2))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(images: Tensor, size: int, draws: _Draws) -> Tensor:
    """DeVries & Taylor 2017: the square's centre lies anywhere in the image, so part of it may fall outside."""
    side = images.shape[-1]
    span = torch.arange(side, device=images.device)
    rows, columns = (span - draws.integers(side)[:, None] + size // 2 for _ in range(2))
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    return images.masked_fill(inside[:, None], 0.0)


class StreamedDataset(Dataset):
    """Image files, decoded and augmented one by one in loader processes."""

    def __init__(
        self,
        config: Config,
        spec: ImageSpec,
        splits: dict[Split, Tensor],
        samples: Sequence[tuple[str, int]],
        device: torch.device,
    ) -> None:
        super().__init__(config, spec, splits, device)
        self.mean, self.std = (tuple(255 * v for v in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.files = _ImageFiles(samples, spec.resolution, config.data.flip)

    @classmethod
    def from_folder(cls, config: Config, device: torch.device) -> StreamedDataset:
        """root/train and root/test; without root/test, root/val is the test set (as ImageNet is used).

        Validation images are root/val where root/test exists too, else a share of root/train.
        """
        root = Path(config.data.root)
        train = image_folder(root / "train", config.data.root)
        has_test = (root / "test").is_dir()
        test = image_folder(root / ("test" if has_test else "val"), config.data.root)
        held = image_folder(root / "val", config.data.root) if has_test and (root / "val").is_dir() else None
        for other in (test, held):
            if other is not None and other.classes != train.classes:
                raise UserError(f"data.root = '{root}': {other.root} has other class folders than {train.root}")
        samples = [*train.samples, *test.samples, *(held.samples if held else [])]
        ends = np.cumsum([len(train.samples), len(test.samples)])
        splits = _splits(
            config, int(ends[0]), torch.arange(ends[0], ends[1]), torch.arange(ends[1], len(samples)) if held else None
        )
        spec = ImageSpec(3, config.data.resolution, len(train.classes))
        return cls(config, spec, splits, samples, device)

    def _plain(self, indices: Tensor) -> Batch:
        return next(self._stream([[(index, None) for index in indices.tolist()]], workers=0))

    def evaluation_batches(self, split: Split, shard: Shard) -> Iterator[Batch]:
        batches = [indices.tolist() for indices in shard.of(self.splits[split]).split(EVAL_BATCH) if len(indices)]
        return self._stream([[(index, None) for index in batch] for batch in batches])

    def _augmented(self, batches: NumberedBatches, key: tuple[object, ...], shard: Shard) -> Iterator[Batch]:
        return self._stream(
            [(index, seed_for(self.config.seed, *key, step, index)) for index in shard.of(indices).tolist()]
            for step, indices in batches
        )

    def _stream(self, batches: Any, workers: int | None = None) -> Iterator[Batch]:
        loader: Any = torch.utils.data.DataLoader(
            self.files,
            batch_sampler=batches,
            num_workers=self.config.data.loader_workers if workers is None else workers,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for images, labels in loader:
                on_device = images.to(self.device, non_blocking=True).float()
                yield self._normalised(on_device), labels.to(self.device, non_blocking=True)
        except UserError as error:  # a loader process puts its traceback in front of the message
            raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None


class _ImageFiles(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Reads (index, seed): a random crop and flip drawn from the seed, or the centre crop where it is None."""

    def __init__(self, samples: Sequence[tuple[str, int]], resolution: int, flip: bool) -> None:
        from torchvision.transforms import v2

        self.samples = samples
        self.training = v2.Compose(
            [v2.RandomResizedCrop(resolution, antialias=True), v2.RandomHorizontalFlip(0.5 if flip else 0.0)]
        )
        self.evaluation = v2.Compose([v2.Resize(resolution * 8 // 7, antialias=True), v2.CenterCrop(resolution)])

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image

        index, seed = key
        path, label = self.samples[index]
        try:
            image = decode_image(path, mode=ImageReadMode.RGB)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"image {path} cannot be read ({reason}); mend or remove the file") from None
        if seed is None:
            return self.evaluation(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.training(image), label

    def __len__(self) -> int:
        return len(self.samples)


def _splits(config: Config, num_train: int, test: Tensor, validation: Tensor | None = None) -> dict[Split, Tensor]:
    """Train, outer, validation and test indices; what is not given is a share of the first `num_train`, by the seed."""
    order = torch.randperm(num_train, generator=generator_for(config.seed, "splits"))
    if not len(test):
        test, order = _take(order, DIGITS_TEST_FRACTION)
    if validation is None:
        validation, order = _take(order, config.data.validation_fraction)
    outer = order
    if config.wml.outer_data == "holdout":
        outer, order = _take(order, config.wml.holdout_fraction)
    splits: dict[Split, Tensor] = {
        "train": order.sort().values,
        "outer": outer.sort().values,
        "validation": validation.sort().values,
        "test": test.sort().values,
    }
    for name, indices in splits.items():
        if not len(indices):
            raise UserError(f"the {name} split of {config.data.name} is empty: {num_train} images are too few")
    return splits


def _take(order: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    count = round(len(order) * fraction)
    return order[:count], order[count:]
