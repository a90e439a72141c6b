"""Splits of a dataset, and the seeds that batches are drawn from."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from wml_ray.config.schema import Config
from wml_ray.errors import UserError

Split = Literal["train", "outer", "validation", "test"]

DIGITS_TEST_FRACTION = 0.2


def seed_for(*parts: object) -> int:
    """A 63-bit seed from any words and numbers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator_for(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(seed_for(*parts))


def make_splits(config: Config, num_train: int, test: Tensor, validation: Tensor | None = None) -> dict[Split, Tensor]:
    """Train, outer, validation and test indices; what is not given is a share of the first `num_train`, by the seed."""
    order = torch.randperm(num_train, generator=generator_for(config.seed, "splits"))
    if not len(test):
        test, order = _take(order, DIGITS_TEST_FRACTION)
    if validation is None:
        validation, order = _take(order, config.data.validation_fraction)
    outer = order
    if config.method.name == "wml" and config.wml.outer_data == "holdout":
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
