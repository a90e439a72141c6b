"""The small datasets: sizes and readers.

A new dataset is a reader function, an entry in DATASETS and a name in DataConfig.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from wml_ray.config.schema import DataConfig
from wml_ray.data.images import class_folders
from wml_ray.data.shards import read_header
from wml_ray.errors import UserError, number_of, one_line, root_cause
from wml_ray.networks.spec import ImageSpec

Array = np.ndarray[Any, np.dtype[Any]]
Images = tuple[Array, Array, int]
"""uint8 images (N, C, H, W), int64 labels (N,), and the number of training images, which are first."""


class DataMissing(UserError):
    """The dataset is not in `data.root`."""


@dataclass(frozen=True)
class SmallDataset:
    """A dataset that fits into memory."""

    spec: ImageSpec
    read: Callable[[DataConfig], Images]
    classes: tuple[str, ...]
    white: int = 255  # the largest value of a pixel


def image_spec(config: DataConfig) -> ImageSpec:
    """Channels, resolution and classes of the configured dataset; reads no image.

    Raises:
        UserError: an image folder or a set of shards that is missing or has no classes.
    """
    if config.name in DATASETS:
        return DATASETS[config.name].spec
    return ImageSpec(3, config.resolution, len(class_names(config)))


def class_names(config: DataConfig) -> list[str]:
    """Names of the classes in the order of their labels; of an image folder, its folders.

    Raises:
        UserError: an image folder or a set of shards that is missing or has no classes.
    """
    if config.name == "imagefolder":
        return class_folders(config)
    if config.name == "shards":
        return read_header(config.root).classes
    return list(DATASETS[config.name].classes)


def image_resolution(config: DataConfig) -> int:
    """Side in pixels of the images that a network sees."""
    return DATASETS[config.name].spec.resolution if config.name in DATASETS else config.resolution


def read_images(config: DataConfig) -> Images:
    """Read a small dataset: uint8 images (N, C, H, W), int64 labels (N,), and the number of training images.

    The training images come first; the rest is the set's own test set.

    Raises:
        UserError: the folder is missing or broken, a label is none of the classes, or the download failed.
    """
    dataset = DATASETS[config.name]
    try:
        images, labels, num_train = dataset.read(config)
    except OSError as error:
        raise UserError(
            f"data.root = '{config.root}' cannot be read ({root_cause(error)}); name another folder"
        ) from None
    for label in np.unique(labels):
        if not 0 <= label < dataset.spec.num_classes:
            raise UserError(
                f"data.root = '{config.root}': label {label} of {config.name} is none of its "
                f"{dataset.spec.num_classes} classes; fetch the dataset again"
            )
    return images, labels, num_train


def check_dataset(config: DataConfig) -> str:
    """Check that the dataset is in `data.root`; returns in words whether it is, or will be downloaded.

    Raises:
        UserError: it is missing or broken.
    """
    if config.name == "imagefolder":
        return f"is there, {len(class_folders(config))} classes"
    if config.name == "shards":
        header = read_header(config.root)
        return f"is there, {len(header.classes)} classes in {number_of(len(header.shards), 'shard')}"
    try:
        images, _, _ = read_images(config.model_copy(update={"download": False}))
    except DataMissing:
        if config.download:
            return "is not there and will be downloaded"
        raise
    return f"is there, {len(images):,} images"


def _read_digits(config: DataConfig) -> Images:
    spec = importlib.util.find_spec("sklearn")  # its file is read without it: to import scikit-learn takes 2 s
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 64 pixels and the label
    images = np.ascontiguousarray(rows[:, :-1].reshape(-1, 1, 8, 8))
    return images, rows[:, -1].astype(np.int64), len(images)


def _read_fashion_mnist(config: DataConfig) -> Images:
    """Read the four IDX files, gzipped or not, from the folder itself or from torchvision's subfolder."""
    root = Path(config.root)
    folders = [root, root / "FashionMNIST" / "raw"]
    if config.download and not any(_idx_file(folder, "train-images-idx3") for folder in folders):
        from torchvision.datasets import FashionMNIST

        _download(root, lambda: FashionMNIST(str(root), download=True))
    folder = next((folder for folder in folders if _idx_file(folder, "train-images-idx3")), None)
    if folder is None:
        raise _missing(config, "train-images-idx3-ubyte[.gz] and its three companions")
    images, labels = [], []
    for prefix in ("train", "t10k"):
        images.append(_read_idx(folder, f"{prefix}-images-idx3", (28, 28)))
        labels.append(_read_idx(folder, f"{prefix}-labels-idx1", ()))
        if len(images[-1]) != len(labels[-1]):
            raise UserError(
                f"data.root = '{root}': the {prefix} images and labels in {folder} do not match; fetch them again"
            )
    pixels = np.concatenate(images).reshape(-1, 1, 28, 28)
    return pixels, np.concatenate(labels).astype(np.int64), len(labels[0])


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in ("", ".gz") if (path := folder / f"{stem}-ubyte{suffix}").is_file()), None)


def _read_idx(folder: Path, stem: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of an IDX file, (N, *shape)."""
    path = _idx_file(folder, stem)
    if path is None:
        raise UserError(f"data.root: {folder / stem}-ubyte[.gz] is missing; fetch the dataset again")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data.root: {path} is broken ({error}); fetch it again") from None
    ndim = 1 + len(shape)
    sizes = tuple(int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, 1 + ndim))
    header = (0x0800 + ndim).to_bytes(4, "big")  # unsigned bytes, and the number of dimensions
    values = np.frombuffer(raw, np.uint8, offset=min(4 + 4 * ndim, len(raw)))
    if raw[:4] != header or sizes[0] == 0 or sizes[1:] != shape or len(values) != math.prod(sizes):
        kind = "x".join(["N", *map(str, shape)])
        raise UserError(f"data.root: {path} is cut short or not an IDX file of {kind} bytes; fetch it again")
    return values.reshape(sizes)


def _read_cifar(config: DataConfig) -> Images:
    """Read with torchvision, which compares every file with its published digest before opening it."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if config.name == "cifar10" else CIFAR100
    root = Path(config.root)
    if config.download:
        _download(root, lambda: kind(str(root), download=True))
    try:
        parts = [kind(str(root), train=train) for train in (True, False)]
    except RuntimeError:
        if (root / kind.base_folder).is_dir():
            raise UserError(
                f"data.root = '{root}': {root / kind.base_folder} is broken (a file is missing or not as published); "
                "delete it and fetch it again with data.download=true"
            ) from None
        raise _missing(config, f"a folder {kind.base_folder}") from None
    images = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    labels = [label for part in parts for label in part.targets]
    return np.ascontiguousarray(images), np.array(labels, np.int64), len(parts[0].data)


def _download(root: Path, fetch: Callable[[], object]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        try:
            fetch()
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"data.download = true: the download into '{root}' failed ({one_line(error)}); check the "
                "network, or set data.root to a folder that holds the dataset"
            ) from None


def _missing(config: DataConfig, expected: str) -> DataMissing:
    return DataMissing(
        f"data.root = '{config.root}' does not have {config.name}: expected {expected}; set data.download=true to "
        "fetch it, or data.root to the folder that has it"
    )


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = (
    *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle"),
    *("bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle"),
    *("chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur"),
    *("dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard"),
    *("lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain"),
    *("mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree"),
    *("plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket"),
    *("rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider"),
    *("squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger"),
    *("tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm"),
)
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DATASETS = {
    "digits": SmallDataset(ImageSpec(1, 8, 10), _read_digits, tuple("0123456789"), white=16),
    "fashion_mnist": SmallDataset(ImageSpec(1, 28, 10), _read_fashion_mnist, _FASHION),
    "cifar10": SmallDataset(ImageSpec(3, 32, 10), _read_cifar, _CIFAR10),
    "cifar100": SmallDataset(ImageSpec(3, 32, 100), _read_cifar, _CIFAR100),
}
