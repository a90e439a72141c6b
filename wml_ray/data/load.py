"""Dataset by its config."""

from __future__ import annotations

import torch

from wml_ray.config.schema import Config
from wml_ray.data.dataset import Dataset
from wml_ray.data.in_memory import InMemoryDataset
from wml_ray.data.readers import SPECS, read_images
from wml_ray.data.splits import make_splits
from wml_ray.data.streamed import StreamedDataset


def load_dataset(config: Config, device: torch.device | str = "cpu") -> Dataset:
    """The dataset of `config`, resident on `device` where it is small.

    Raises:
        UserError: the folder is missing or broken, the download failed, or a split would be empty.
    """
    if config.data.name == "imagefolder":
        return StreamedDataset.from_folder(config, torch.device(device))
    images, labels, num_train = read_images(config.data)
    splits = make_splits(config, num_train, torch.arange(num_train, len(labels)))
    return InMemoryDataset(config, SPECS[config.data.name], splits, images, labels, torch.device(device))
