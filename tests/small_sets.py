"""Small datasets as the tests make and load them."""

import gzip
from itertools import islice

import numpy as np
import torch
from torchvision.io import write_png

from wml_ray.config.load import parse_config
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank

ALONE = WorkerRank()


def digits(**settings):
    data = {"batch_size": 64, **settings.pop("data", {})}
    return load_dataset(parse_config({"data": data, **settings}))


def listed(batches, count=None):
    return [(inputs.clone(), targets.clone()) for inputs, targets in islice(batches, count)]


def same(batches, others):
    pairs = zip(batches, others, strict=True)
    return all(torch.equal(x, other_x) and torch.equal(y, other_y) for (x, y), (other_x, other_y) in pairs)


def over_workers(batches_of, world_size, count):
    """What `world_size` workers see together, step by step."""
    shares = [listed(batches_of(WorkerRank(rank, world_size)), count) for rank in range(world_size)]
    return [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in zip(*shares, strict=True)]


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_idx(path, values, compress=False):
    header = (0x0800 + values.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in values.shape)
    raw = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".gz" * compress).write_bytes(gzip.compress(raw) if compress else raw)


def make_fashion_mnist(folder, train=200, test=50, compress=False, pixels_of=None):
    random = np.random.default_rng(0)
    written = []
    for prefix, count in (("train", train), ("t10k", test)):
        labels = random.integers(0, 10, count)
        images = random.integers(0, 256, (count, 28, 28)) if pixels_of is None else np.stack([*map(pixels_of, labels)])
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images, compress)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels, compress)
        written.append((images, labels))
    return [np.concatenate(parts) for parts in zip(*written, strict=True)]


def fashion_mnist(root, **data):
    return load_dataset(parse_config({"data": {"name": "fashion_mnist", "root": str(root), "batch_size": 16, **data}}))


def make_image_folder(root, parts=("train", "val"), images_a_class=12):
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(images_a_class):
                height, width = (int(torch.randint(6, 20, (), generator=generator)) for _ in range(2))
                pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
                write_png(pixels, str(folder / f"{index:02d}.png"))
    return root


def image_folder(root, channels_last=True, **data):
    settings = {"name": "imagefolder", "root": str(root), "batch_size": 5, "resolution": 8, "loader_workers": 0}
    optim = {"channels_last": channels_last}
    return load_dataset(parse_config({"data": {**settings, "flip": True, **data}, "optim": optim}))
