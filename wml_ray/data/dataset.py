"""Batches of a dataset, a function of seed, epoch and step alone.

A small dataset is a tensor on the training device; an image folder is streamed by loader processes. A worker uses its
share of every global batch, so the number of workers changes no batch.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from wml_ray.config.schema import Config
from wml_ray.data.splits import Split, generator_for
from wml_ray.distributed import WorkerRank
from wml_ray.errors import UserError
from wml_ray.methods.base import Batch
from wml_ray.networks.spec import ImageSpec

NumberedBatches = Iterable[tuple[int, Tensor]]  # step of the epoch, indices
SALIENCY_BATCH = 64  # largest batch of a pass through the unpruned tree
EVAL_BATCH = 512  # images that a worker evaluates at once


def view_keys(key: tuple[object, ...], step: int, views: int) -> list[tuple[object, ...]]:
    """The keys that the augmentation of each view of a step is drawn from."""
    return [(*key, step), *((*key, step, "view", view) for view in range(1, views))]


class Dataset(ABC):
    """Batches of one dataset. Inputs are normalised, (B, C, H, W) float32 on the training device; targets (B,)."""

    mean: tuple[float, ...]  # of each channel, in the units the images are stored in
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()  # images left out as they cannot be decoded, below data.root

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
        """Number of full global batches in the training split; an incomplete last batch is not used."""
        return len(self.splits["train"]) // self.batch_size

    @property
    def outer_batch_size(self) -> int:
        """Number of images of a global batch for the outer loss."""
        wml = self.config.wml
        learned = self.config.method.name == "wml" and wml.weights == "learned"
        wanted = wml.outer_images(self.batch_size) if learned else self.batch_size
        return min(wanted, len(self.splits["outer"]))

    def train_batches(self, epoch: int, worker: WorkerRank, first: int = 0, views: int = 1) -> Iterator[Batch]:
        """This worker's share of each batch of an epoch, from step `first`, in an order drawn from seed and epoch.

        With several `views` of each image, which differ by their augmentation, inputs are (views * B, C, H, W): all
        first views, then all second ones; targets stay (B,). The first views are those of a call with one view.
        """
        order = self._shuffled("train", epoch)[: self.steps_per_epoch * self.batch_size]
        batches = enumerate(order.split(self.batch_size))
        return self._augmented(itertools.islice(batches, first, None), ("train", epoch), worker, views)

    def outer_batches(self, epoch: int, worker: WorkerRank, first: int = 0) -> Iterator[Batch]:
        """Endless batches for the outer loss, from step `first`: augmented like training batches, in another order."""
        size = self.outer_batch_size
        orders = (self._shuffled("outer", (epoch, lap)) for lap in itertools.count())
        batches = enumerate(batch for order in orders for batch in order.split(size) if len(batch) == size)
        return self._augmented(itertools.islice(batches, first, None), ("outer", epoch), worker)

    def saliency_batches(self, images: int) -> list[Batch]:
        """Batches with `images` training images in total, drawn by the seed, not augmented."""
        order = self._shuffled("train", "saliency")[:images]
        return [self._plain(indices) for indices in order.tensor_split(-(-len(order) // SALIENCY_BATCH))]

    def evaluation_batches(self, split: Split, worker: WorkerRank) -> Iterator[Batch]:
        """This worker's share of a split, in order and without augmentation."""
        for indices in worker.share_of(self.splits[split]).split(EVAL_BATCH):
            if len(indices):
                yield self._plain(indices)

    def _shuffled(self, split: Split, key: object) -> Tensor:
        indices = self.splits[split]
        return indices[torch.randperm(len(indices), generator=generator_for(self.config.seed, split, key))]

    @abstractmethod
    def _augmented(
        self, batches: NumberedBatches, key: tuple[object, ...], worker: WorkerRank, views: int = 1
    ) -> Iterator[Batch]:
        """This worker's share of each global batch of indices, with augmentation drawn from (seed, key, step), and of
        a further view from (seed, key, step, "view", its number).
        """

    @abstractmethod
    def pixels(self, indices: Tensor) -> Batch:
        """The images of `indices` as evaluation sees them but not normalised, uint8 (B, C, H, W), and targets (B,)."""

    @abstractmethod
    def _plain(self, indices: Tensor) -> Batch:
        """The images of `indices`, normalised and not augmented, and their targets."""

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on the device, cached: a copy for each batch would stall the GPU."""
        mean_C, std_C = (torch.tensor(values, device=self.device) for values in (self.mean, self.std))
        return mean_C, std_C

    def _normalised(self, images: Tensor) -> Tensor:
        """Stored images, uint8 (B, C, H, W), as normalised float32, in the memory format of training."""
        mean_C, std_C = self._statistics
        if not self.config.optim.channels_last:
            images = images.contiguous().float()
            return images.sub_(mean_C[:, None, None]).div_(std_C[:, None, None])
        images_BHWC = images.permute(0, 2, 3, 1).contiguous().float()
        rows = images_BHWC.flatten(2)  # of W * C values: the CPU does not vectorise over C of them
        width = images.shape[-1]
        rows.sub_(mean_C.repeat(width)).div_(std_C.repeat(width))
        return images_BHWC.permute(0, 3, 1, 2)
