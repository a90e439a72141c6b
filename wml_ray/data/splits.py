"""Splits of a dataset, and the seeds that batches are drawn from."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from wml_ray.config.schema import Config
from wml_ray.errors import UserError

Split = Literal["train", "outer", "validation", "test"]

TEST_FRACTION = 0.2  # of the images of a set that has no test set of its own


def seed_for(*parts: object) -> int:
    """A 63-bit seed from any words and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_for(*parts: object) -> torch.Generator:
    """A generator seeded with `seed_for(*parts)`."""
    return torch.Generator().manual_seed(seed_for(*parts))


def make_splits(
    config: Config, labels: Tensor, num_train: int, num_test: int, num_validation: int = 0
) -> dict[Split, Tensor]:
    """Indices of the train, outer, validation and test split, each sorted.

    The images are ordered as training, test and validation images, with `labels` (N,). Without own test or validation
    images, a share of the training images drawn by the seed takes their place. data.train_images is applied last.

    Raises:
        UserError: a split is empty, or there are fewer training images than data.train_images.
    """
    order = torch.randperm(num_train, generator=generator_for(config.seed, "splits"))
    test = torch.arange(num_train, num_train + num_test)
    validation = torch.arange(num_train + num_test, num_train + num_test + num_validation)
    if not num_test:
        test, order = _take(order, TEST_FRACTION)
    if not num_validation:
        validation, order = _take(order, config.data.validation_fraction)
    holdout = None
    if config.method.name == "wml" and config.wml.outer_data == "holdout":
        holdout, order = _take(order, config.wml.holdout_fraction)
    if config.data.train_images is not None:
        order = _balanced(config, order, labels)
    splits: dict[Split, Tensor] = {
        "train": order.sort().values,
        "outer": (order if holdout is None else holdout).sort().values,
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


def _balanced(config: Config, order: Tensor, labels: Tensor) -> Tensor:
    """The first data.train_images of `order`, taken from each class in turn; a smaller subset is part of a larger."""
    count = config.data.train_images
    assert count is not None
    labels_N = labels[order]
    num_classes = len(labels_N.unique())
    if not num_classes <= count <= len(order):
        raise UserError(
            f"data.train_images = {count} must lie between the {num_classes} classes and the {len(order)} training "
            f"images of {config.data.name} that are left after validation and test images; null uses all"
        )
    turns_K = torch.randperm(int(labels.max()) + 1, generator=generator_for(config.seed, "train_images"))
    position_N = torch.empty_like(labels_N)  # of an image among those of its class
    for label in labels_N.unique():
        of_class = labels_N == label
        position_N[of_class] = torch.arange(int(of_class.sum()))
    return order[(position_N * len(turns_K) + turns_K[labels_N]).argsort()[:count]]
