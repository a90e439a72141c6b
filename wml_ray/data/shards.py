"""Sets of shards: tar files of an image folder, with an index of where each image is.

The images have the order of the image folder, so that a seed draws the same batches from either.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wml_ray.config.schema import DataConfig
from wml_ray.data.images import decode_image
from wml_ray.data.shard_cache import Shard, ShardCache, read_file
from wml_ray.errors import UserError
from wml_ray.storage.files import DamagedFile, parse_object

if TYPE_CHECKING:  # the header is read without PyTorch
    from torch import Tensor

HEADER, INDEX = "shards.json", "index.npy"
HEADER_KEYS = ("classes", "num_train", "num_test", "skipped", "resize", "index_sha256", "shards")
ROW = np.dtype([("shard", "<i4"), ("start", "<i8"), ("size", "<i4"), ("label", "<i4"), ("crc32", "<u4")])
READS = 16  # images that a loader process requests from a remote storage at once
Rows = np.ndarray[Any, np.dtype[np.void]]


@dataclass(frozen=True)
class ShardHeader:
    """What `shards.json` says: classes, numbers of images, the images left out with the reason, and the shards."""

    classes: list[str]
    num_train: int
    num_test: int
    skipped: dict[str, str]
    resize: int | None
    index_sha256: str
    shards: tuple[Shard, ...]

    @classmethod
    def parse(cls, text: str) -> ShardHeader:
        """The header of a text.

        Raises:
            DamagedFile: the text is not such a header.
        """
        values = parse_object(text, HEADER_KEYS)
        try:
            shards = tuple(Shard(**shard) for shard in values["shards"])
        except TypeError as error:
            raise DamagedFile(str(error)) from None
        return cls(**{key: values[key] for key in HEADER_KEYS} | {"shards": shards})

    def to_text(self) -> str:
        """The header as JSON."""
        shards = [vars(shard) for shard in self.shards]
        return json.dumps({**vars(self), "shards": shards}, indent=1)


def read_header(root: str) -> ShardHeader:
    """The header of the set in a folder or at an address.

    Raises:
        UserError: there is none, or it is damaged.
        StorageUnavailable: the storage failed for ten minutes.
    """
    return _read_header(root)[0]


def _read_header(root: str) -> tuple[ShardHeader, str]:
    """The header and the digest of its text."""
    raw = read_file(root, HEADER)
    try:
        return ShardHeader.parse(raw.decode(errors="replace")), hashlib.sha256(raw).hexdigest()
    except DamagedFile as error:
        raise UserError(
            f"data.root = '{root}': {HEADER} is damaged ({error}); write the set again with `wml-ray shard`"
        ) from None


class ShardedImages:
    """The images of a set of shards, read by their place in the image folder that it was made of."""

    def __init__(self, config: DataConfig) -> None:
        """Read the index.

        Raises:
            UserError: the set is missing, its index is damaged, or a label is none of its classes.
            StorageUnavailable: the storage failed for ten minutes.
        """
        self.root = config.root
        self.header, digest = _read_header(config.root)
        self.classes = self.header.classes
        self.num_train, self.num_test = self.header.num_train, self.header.num_test
        self.rows = self._read_index()
        limit_bytes = int(config.cache_gb * 1e9)
        self.cache = ShardCache(config.root, digest, self.header.shards, config.cache_path, limit_bytes)

    @property
    def labels(self) -> Sequence[int]:
        """The label of each image."""
        labels: list[int] = self.rows["label"].tolist()
        return labels

    def read(self, indices: Sequence[int], max_pixels: int) -> Iterator[tuple[Tensor, int]]:
        """Image, uint8 (3, H, W), and label of each index; of a remote set, the next ones are read meanwhile.

        Raises:
            UserError: an image cannot be decoded, or its bytes are not those that were written.
            StorageUnavailable: the storage failed for ten minutes.
        """
        if "://" not in self.root:
            yield from (self._decode(index, self._bytes(index), max_pixels) for index in indices)
            return
        with ThreadPoolExecutor(READS) as pool:
            for index, content in zip(indices, pool.map(self._bytes, indices), strict=True):
                yield self._decode(index, content, max_pixels)

    def read_ahead(self) -> None:
        """Start to fetch whole shards into the cache, once.

        Raises:
            UserError: a shard fetched so far was damaged or missing, or the storage failed for ten minutes.
        """
        self.cache.start()
        self.cache.check()

    def _decode(self, index: int, content: bytes, max_pixels: int) -> tuple[Tensor, int]:
        return decode_image(io.BytesIO(content), self._place(index), max_pixels), int(self.rows["label"][index])

    def _bytes(self, index: int) -> bytes:
        number, start, size, _, crc32 = self.rows[index].tolist()
        content = self.cache.read(number, start, start + size)
        if len(content) != size or zlib.crc32(content) != crc32:
            raise UserError(
                f"{self._place(index)} is damaged: its bytes are not those that the index describes; write the shard "
                f"again with `wml-ray shard`, or remove its local copy below data.cache_path"
            )
        return content

    def _place(self, index: int) -> str:
        row = self.rows[index]
        return f"{self.root.rstrip('/')}/{self.header.shards[row['shard']].name}, image at byte {row['start']}"

    def _read_index(self) -> Rows:
        raw = read_file(self.root, INDEX)
        if hashlib.sha256(raw).hexdigest() != self.header.index_sha256:
            raise UserError(f"data.root = '{self.root}': {INDEX} is damaged; write the set again with `wml-ray shard`")
        rows: Rows = np.load(io.BytesIO(raw))
        for label in np.unique(rows["label"]):
            if not 0 <= label < len(self.classes):
                raise UserError(
                    f"data.root = '{self.root}': label {label} of {INDEX} is none of the {len(self.classes)} classes "
                    f"of {HEADER}; write the set again with `wml-ray shard`"
                )
        return rows
