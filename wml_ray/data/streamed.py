"""A dataset of image files, decoded and augmented in loader processes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wml_ray.config.schema import Config, DataConfig
from wml_ray.data.dataset import EVAL_BATCH, Dataset, NumberedBatches, view_keys
from wml_ray.data.images import ImageListing, read_image
from wml_ray.data.splits import Split, make_splits, seed_for
from wml_ray.distributed import WorkerRank
from wml_ray.errors import UserError
from wml_ray.methods.base import Batch
from wml_ray.networks.spec import ImageSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class StreamedDataset(Dataset):
    """Image files, decoded and augmented one by one in loader processes."""

    def __init__(
        self, config: Config, listing: ImageListing, device: torch.device, skipped: Collection[str] = ()
    ) -> None:
        """`skipped` names the images that `listing` leaves out."""
        spec = ImageSpec(3, config.data.resolution, len(listing.classes))
        labels = torch.tensor([label for _, label in listing.samples])
        num_validation = len(labels) - listing.num_train - listing.num_test
        splits = make_splits(config, labels, listing.num_train, listing.num_test, num_validation)
        super().__init__(config, spec, splits, device)
        self.skipped = tuple(skipped)
        self.mean, self.std = (tuple(255 * v for v in values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.files = ImageFiles(listing.samples, config.data)

    def pixels(self, indices: Tensor) -> Batch:
        return next(self._decoded([[(index, ()) for index in indices.tolist()]], workers=0))

    def _plain(self, indices: Tensor) -> Batch:
        images, labels = self.pixels(indices)
        return self._normalised(images.float()), labels

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

        return self._stream(
            [(index, seeds(step, index)) for index in worker.share_of(indices).tolist()] for step, indices in batches
        )

    def _stream(self, batches: Any) -> Iterator[Batch]:
        for images, labels in self._decoded(batches):
            yield self._normalised(images.float()), labels

    def _decoded(self, batches: Any, workers: int | None = None) -> Iterator[Batch]:
        """Uint8 images (views * B, C, H, W), all first views first, and labels (B,), on the training device."""
        loader: Any = torch.utils.data.DataLoader(
            self.files,
            batch_sampler=batches,
            num_workers=self.config.data.loader_workers if workers is None else workers,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for images, labels in loader:  # images (B, views, C, H, W)
                on_device = images.to(self.device, non_blocking=True).transpose(0, 1).flatten(0, 1)
                yield on_device, labels.to(self.device, non_blocking=True)
        except UserError as error:  # the message of a loader process starts with its traceback
            raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None


def evaluation_transform(resolution: int) -> Any:
    """A resize and a centre crop of images (C, H, W) to (C, resolution, resolution)."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(resolution * 8 // 7, antialias=True), v2.CenterCrop(resolution)])


class ImageFiles(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Reads (index, seeds): a random crop and flip drawn from each seed, or the centre crop if there is no seed."""

    def __init__(self, samples: Sequence[tuple[str, int]], config: DataConfig) -> None:
        from torchvision.transforms import v2

        self.samples, self.max_pixels = samples, config.max_pixels
        resolution = config.resolution
        self.training = v2.Compose(
            [v2.RandomResizedCrop(resolution, antialias=True), v2.RandomHorizontalFlip(0.5 if config.flip else 0.0)]
        )
        self.evaluation = evaluation_transform(resolution)

    def __getitem__(self, key: tuple[int, tuple[int, ...]]) -> tuple[Tensor, int]:
        index, seeds = key
        path, label = self.samples[index]
        image = read_image(path, self.max_pixels)
        if not seeds:
            return self.evaluation(image)[None], label
        with torch.random.fork_rng(devices=[]):
            return torch.stack([self._view(image, seed) for seed in seeds]), label

    def _view(self, image: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        view: Tensor = self.training(image)
        return view

    def __len__(self) -> int:
        return len(self.samples)
