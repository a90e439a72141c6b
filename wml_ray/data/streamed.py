"""A dataset of encoded images, in files or in shards, decoded and augmented in loader processes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from wml_ray.config.schema import Config, DataConfig
from wml_ray.data.dataset import EVAL_BATCH, Dataset, NumberedBatches, view_keys
from wml_ray.data.splits import Split, make_splits, seed_for
from wml_ray.distributed import WorkerRank
from wml_ray.errors import UserError
from wml_ray.methods.base import Batch
from wml_ray.networks.spec import ImageSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Protocol):
    """Encoded images of a set: those for training first, then those for testing, then those for validation."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes in the order of their labels."""

    @property
    def num_train(self) -> int:
        """Number of training images."""

    @property
    def num_test(self) -> int:
        """Number of test images."""

    @property
    def labels(self) -> Sequence[int]:
        """The label of each image."""

    def read(self, indices: Sequence[int], max_pixels: int) -> Iterator[tuple[Tensor, int]]:
        """Image, uint8 (3, H, W), and label of each index."""

    def read_ahead(self) -> None:
        """Called at each training step: fetch what later steps need, and raise the errors met there since."""


class StreamedDataset(Dataset):
    """Encoded images, decoded and augmented one by one in loader processes."""

    def __init__(self, config: Config, images: Images, device: torch.device, skipped: Collection[str] = ()) -> None:
        """`skipped` names the images that `images` leaves out."""
        spec = ImageSpec(3, config.data.resolution, len(images.classes))
        labels = torch.tensor(images.labels)
        num_validation = len(labels) - images.num_train - images.num_test
        splits = make_splits(config, labels, images.num_train, images.num_test, num_validation)
        super().__init__(config, spec, splits, device)
        self.skipped = tuple(skipped)
        self.mean, self.std = (tuple(255 * v for v in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.images = images
        self.files = ImageFiles(images, config.data)

    def pixels(self, indices: Tensor) -> Batch:
        images, labels = self._at(indices)
        return images.contiguous(), labels

    def _plain(self, indices: Tensor) -> Batch:
        images, labels = self._at(indices)
        return self._normalised(images), labels

    def _at(self, indices: Tensor) -> Batch:
        return next(self._decoded([[(index, ()) for index in indices.tolist()]], workers=0))

    def evaluation_batches(self, split: Split, worker: WorkerRank) -> Iterator[Batch]:
        batches = [
            indices.tolist() for indices in worker.share_of(self.splits[split]).split(EVAL_BATCH) if len(indices)
        ]
        return self._stream([[(index, ()) for index in batch] for batch in batches])

    def _augmented(
        self, batches: NumberedBatches, key: tuple[object, ...], worker: WorkerRank, views: int = 1
    ) -> Iterator[Batch]:
        def seeds(step: int, index: int) -> tuple[int, ...]:
            keys = view_keys(key, step, views)
            return tuple(seed_for(self.config.seed, *drawn_from, index) for drawn_from in keys)

        stream = self._stream(
            [(index, seeds(step, index)) for index in worker.share_of(indices).tolist()] for step, indices in batches
        )
        for batch in stream:
            self.images.read_ahead()
            yield batch

    def _stream(self, batches: Any) -> Iterator[Batch]:
        for images, labels in self._decoded(batches):
            yield self._normalised(images), labels

    def _decoded(self, batches: Any, workers: int | None = None) -> Iterator[Batch]:
        """Uint8 images (views * B, C, H, W), all first views first, and labels (B,), on the training device."""
        loader: Any = torch.utils.data.DataLoader(
            self.files,
            batch_sampler=batches,
            num_workers=self.config.data.loader_workers if workers is None else workers,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for images, labels in loader:  # images (B, views, H, W, C)
                on_device = images.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
                yield on_device.permute(0, 3, 1, 2), labels.to(self.device, non_blocking=True)
        except UserError as error:  # the message of a loader process has its traceback before that of the error
            last = str(error).strip().splitlines()[-1]
            raise type(error)(re.sub(r"^wml_ray[.\w]+: ", "", last)) from None


def evaluation_transform(resolution: int) -> Any:
    """A resize and a centre crop of images (C, H, W) to (C, resolution, resolution)."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(resolution * 8 // 7, antialias=True), v2.CenterCrop(resolution)])


class ImageFiles(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Reads (index, seeds): a random crop and flip drawn from each seed, or the centre crop if there is no seed."""

    def __init__(self, images: Images, config: DataConfig) -> None:
        from torchvision.transforms import v2

        self.images, self.max_pixels = images, config.max_pixels
        self.crop = v2.RandomResizedCrop(config.resolution, antialias=True)
        self.flip = v2.RandomHorizontalFlip(0.5 if config.flip else 0.0)
        self.evaluation = evaluation_transform(config.resolution)

    def __getitems__(self, keys: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[Tensor, int]]:
        """Views (views, H, W, C) and label of each image of a batch; a DataLoader calls this once a batch."""
        read = self.images.read([index for index, _ in keys], self.max_pixels)
        with torch.random.fork_rng(devices=[]):
            return [(self._views(image, seeds), label) for (_, seeds), (image, label) in zip(keys, read, strict=True)]

    def _views(self, image: Tensor, seeds: tuple[int, ...]) -> Tensor:
        views = [self._view(image, seed) for seed in seeds] if seeds else [self.evaluation(image)]
        return torch.stack([view.permute(1, 2, 0) for view in views])

    def _view(self, image: Tensor, seed: int) -> Tensor:
        """A random crop, resized, and flipped or not; (C, H, W) with the channels last in memory."""
        from torchvision.transforms.v2 import functional as F

        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also formats the stack, for a later CUDA
        box = self.crop.make_params([image])
        pixels_HWC = F.crop(image, **box).permute(1, 2, 0).contiguous()  # resized faster so, to the same values
        view: Tensor = self.flip(F.resize(pixels_HWC.permute(2, 0, 1), self.crop.size, antialias=True))
        return view
