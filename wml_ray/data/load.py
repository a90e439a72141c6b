"""Load the configured dataset."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch

from wml_ray.config.schema import Config
from wml_ray.data.check import undecodable_images
from wml_ray.data.dataset import Dataset
from wml_ray.data.images import list_images, printable
from wml_ray.data.in_memory import InMemoryDataset
from wml_ray.data.readers import DATASETS, read_images
from wml_ray.data.shards import ShardedImages
from wml_ray.data.splits import make_splits
from wml_ray.data.streamed import StreamedDataset


def load_dataset(config: Config, device: torch.device | str = "cpu", skipped: Collection[str] | None = None) -> Dataset:
    """Load the dataset of `config`; a small one is kept in the memory of `device`.

    `skipped` names images of an image folder to leave out, below `data.root`. With None and data.skip_bad, every image
    is decoded once to find those that cannot be. A set of shards records those that it leaves out.

    Raises:
        UserError: the folder is missing or broken, the download failed, or a split would be empty.
    """
    device = torch.device(device)
    if config.data.name == "imagefolder":
        if skipped is None:
            skipped = _skipped_images(config)
        listing = list_images(config.data).without(skipped)
        return StreamedDataset(config, listing, device, skipped)
    if config.data.name == "shards":
        shards = ShardedImages(config.data)
        return StreamedDataset(config, shards, device, shards.header.skipped)
    pixels, classes, num_train = read_images(config.data)
    images, labels = torch.from_numpy(pixels), torch.from_numpy(classes)
    splits = make_splits(config, labels, num_train, len(labels) - num_train)
    return InMemoryDataset(config, DATASETS[config.data.name].spec, splits, images, labels, device)


def _skipped_images(config: Config) -> Collection[str]:
    if not config.data.skip_bad:
        return ()
    bad = undecodable_images(config.data, decode_all=True)
    if bad:
        name, reason = next(iter(bad.items()))
        warnings.warn(
            f"data.skip_bad = true: {len(bad):,} images cannot be decoded and are left out, first {printable(name)} "
            f"({reason}); skipped_images in plan.json and result.json lists all",
            stacklevel=2,
        )
    return bad
