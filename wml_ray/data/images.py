"""Image folders: the files, classes and parts of a set, and the decoder of one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from wml_ray.config.schema import MAX_PIXELS, DataConfig
from wml_ray.errors import UserError, shortened

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class ImageListing:
    """Images of one set, those of root/train first, then those of the test folder, then those of root/val."""

    root: str
    classes: list[str]
    samples: list[tuple[str, int]]  # path, label
    num_train: int
    num_test: int

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        return [label for _, label in self.samples]

    def read(self, indices: Sequence[int], max_pixels: int) -> Iterator[tuple[Tensor, int]]:
        """Image, uint8 (3, H, W), and label of each index.

        Raises:
            UserError: an image cannot be decoded.
        """
        for index in indices:
            path, label = self.samples[index]
            yield read_image(path, max_pixels), label

    def read_ahead(self) -> None:
        """Nothing: the images are files of a folder."""

    def name(self, path: str) -> str:
        """Path below the root, as `skipped_images` records it."""
        return os.path.relpath(path, self.root)

    def without(self, skipped: Collection[str]) -> ImageListing:
        """The same set without the images named in `skipped`.

        Raises:
            UserError: a class folder has no image left.
        """
        if not skipped:
            return self
        names = set(skipped)
        kept = [self.name(path) not in names for path, _ in self.samples]
        folders = [{os.path.dirname(path) for path, _ in samples} for samples in (self.samples, self._select(kept))]
        if emptied := sorted(folders[0] - folders[1]):
            raise UserError(
                f"data.skip_bad = true: no image of {printable(emptied[0])} can be decoded; repair its images, or "
                "remove the class from every part of the set"
            )
        num_test = sum(kept[self.num_train : self.num_train + self.num_test])
        return replace(self, samples=self._select(kept), num_train=sum(kept[: self.num_train]), num_test=num_test)

    def _select(self, kept: list[bool]) -> list[tuple[str, int]]:
        return [sample for sample, keep in zip(self.samples, kept, strict=True) if keep]


def list_images(config: DataConfig) -> ImageListing:
    """List root/train and root/test; without root/test, root/val is the test set (as ImageNet is used).

    Validation images are those of root/val if root/test exists too; otherwise root/val adds none.

    Raises:
        UserError: a folder is missing, a class has no image, or the parts have different classes.
    """
    root = Path(config.root)
    has_test = (root / "test").is_dir()
    parts = ["train", "test" if has_test else "val", *(["val"] if has_test and (root / "val").is_dir() else [])]
    train, test, *validation = (_read_folder(config.root, _list_part, root / part) for part in parts)
    for part, (classes, _) in zip(parts[1:], (test, *validation), strict=True):
        if classes != train[0]:
            raise UserError(f"data.root = '{root}': {root / part} has other class folders than {root / 'train'}")
    samples = [sample for _, samples in (train, test, *validation) for sample in samples]
    return ImageListing(config.root, train[0], samples, len(train[1]), len(test[1]))


def _list_part(folder: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names of a folder, and path and label of each image, in the order of torchvision's ImageFolder.

    Raises:
        FileNotFoundError: the folder is missing, or a class has no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

    classes, _ = find_classes(folder)
    samples: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        files = _files_below(os.path.join(folder, name))
        found = [(path, label) for path in files if path.lower().endswith(IMG_EXTENSIONS)]
        if not found:
            raise FileNotFoundError(f"found no image in {os.path.join(folder, name)}")
        samples += found
    return classes, samples


def _files_below(folder: str) -> list[str]:
    """All files below a folder, sorted by folder and name.

    Links to folders are followed, but no folder is entered twice, nor one that contains `folder`: links can form loops.
    """
    top = os.path.realpath(folder)
    entered, files = {top}, []
    for here, folders, names in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(here, name)) for name in sorted(folders)}
        folders.clear()
        for name, target in real.items():
            if target not in entered and not f"{top}/".startswith(f"{target.rstrip('/')}/"):
                entered.add(target)
                folders.append(name)
        files.append((here, sorted(names)))
    return [os.path.join(here, name) for here, names in sorted(files) for name in names]


def labelled_images(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Path and label of each image below folder/<class>/, labelled by its place in `classes`; a class may be missing.

    Raises:
        UserError: the folder is missing, has no image, or a folder in it is none of the classes.
    """
    try:
        names, samples = _list_part(str(folder))
    except OSError as error:
        raise UserError(f"{folder}: {printable(str(error))}; it needs <class>/<image>") from None
    if unknown := [name for name in names if name not in classes]:
        raise UserError(
            f"{folder} has the classes {shortened(', '.join(unknown))}, which are none of the network's; rename them "
            f"to some of: {shortened(', '.join(classes), 400)}"
        )
    return [(path, classes.index(names[label])) for path, label in samples]


def class_folders(config: DataConfig) -> list[str]:
    """Names of the class folders of root/train; lists no image, as there may be a million.

    Raises:
        UserError: the folder is missing or has no class.
    """
    from torchvision.datasets.folder import find_classes

    classes, _ = _read_folder(config.root, find_classes, Path(config.root) / "train")
    return list(classes)


def read_image(path: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file to uint8 RGB (3, H, W), rotated by its EXIF orientation.

    Pillow decodes: torchvision's decoder, which is deprecated, crashes the process on some damaged PNG files, ignores
    the orientation of WebP, and reads no BMP or TIFF.

    Raises:
        UserError: the file cannot be decoded, or its header names more than `max_pixels` pixels.
    """
    return decode_image(path, path, max_pixels)


def decode_image(file: str | BytesIO, name: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """As `read_image`, from a path or from the bytes of a file; `name` is that of the image in messages."""
    try:
        return _decode(file, max_pixels)
    except Exception as error:  # decoders raise many types; each means that this file cannot be decoded
        raise UserError(
            f"image {printable(name)} cannot be decoded ({decode_reason(error)}); repair or remove the file, or set "
            "data.skip_bad=true"
        ) from error


def decode_reason(error: BaseException) -> str:
    """A decoder's error in a few words, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or of an unknown format"
    return printable((str(error) or type(error).__name__).splitlines()[0])


def printable(text: str) -> str:
    """`text` on one line: newlines and other unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _decode(file: str | BytesIO, max_pixels: int) -> Tensor:
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses images of twice that
    try:
        image = Image.open(file)
    except Image.DecompressionBombError:
        raise _too_many_pixels(max_pixels) from None
    with image:
        if image.width * image.height > max_pixels:
            raise _too_many_pixels(max_pixels)
        return decoded(image)


def decoded(image: PilImage) -> Tensor:
    """A PIL image as uint8 RGB (3, H, W), rotated by its EXIF orientation.

    Pixels stay in Pillow's order, channels last: torchvision resizes them faster, to the same values.
    """
    import torch
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip instead of scale
        pixels = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    else:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _too_many_pixels(max_pixels: int) -> ValueError:
    return ValueError(f"more than data.max_pixels = {max_pixels:,} pixels")


def _read_folder(root: str, read: Callable[[str], T], folder: Path) -> T:
    try:
        return read(str(folder))
    except OSError as error:
        reason = printable(str(error))
        raise UserError(
            f"data.root = '{root}': {reason}; it needs train/<class>/<image>, and the same classes in val/ or test/"
        ) from None
