"""The verb `shard`: an image folder as tar files with an index, for `data.name=shards`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from wml_ray.config.schema import DataConfig
from wml_ray.data.check import LISTED, progress
from wml_ray.data.images import ImageListing, decode_image, decode_reason, list_images, printable
from wml_ray.data.shard_cache import Shard
from wml_ray.data.shards import HEADER, INDEX, ROW, ShardHeader
from wml_ray.errors import UserError
from wml_ray.storage.files import DamagedFile, get_text, parse_object, write_text
from wml_ray.storage.paths import is_remote, to_path
from wml_ray.storage.retry import retry_storage

PARTS = "parts"  # what each finished shard was made of
JPEG_QUALITY = 95
RATIO_SAMPLE = 32  # images that are resized to foresee the size of the shards
PART_KEYS = ("key", "shard", "rows", "bad")
MAX_MB = 512


@dataclass(frozen=True)
class _Source:
    """An image file: its name below the folder, its size and the time of its last change."""

    path: str
    name: str
    label: int
    bytes: int
    changed_ns: int


@dataclass(frozen=True)
class _Part:
    """One written shard: the images it was made of, its rows of the index, and the images it leaves out."""

    key: str
    shard: dict[str, Any]
    rows: list[tuple[int, int, int, int]]  # start, size, label, crc32
    bad: dict[str, str]  # name -> reason


def shard(
    folder: str, target: str, shard_mb: int = 64, resize: int | None = None, skip_bad: bool = False
) -> ShardHeader:
    """Write the images below `folder` (train/<class>/, test/ or val/) as shards of about `shard_mb` MB and an index.

    Every image is decoded once; its file is copied unchanged. With `resize`, an image whose shorter side has more
    pixels is resized to it and written as a JPEG file. Shards that an earlier call finished are kept if the files they
    were made of are the same. Returns the header of the set, which is written last.

    Raises:
        UserError: the folder is no image folder, or images cannot be decoded and `skip_bad` is not set; all are named.
        StorageUnavailable: the storage of the target failed for ten minutes.
    """
    if not 1 <= shard_mb <= MAX_MB or (resize is not None and resize < 8):
        raise UserError(f"--shard-mb must be from 1 to {MAX_MB}, and --resize at least 8")
    root = to_path(target)
    listing = list_images(DataConfig(name="imagefolder", root=folder))
    retry_storage(lambda: (root / HEADER).unlink(missing_ok=True), root)  # while shards are replaced there is no set
    groups = list(_groups(_sources(listing), shard_mb, resize))
    parts: list[_Part] = []
    with progress("writing shards", bar=True) as on_progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        images = 0
        for group, part in zip(groups, pool.map(partial(_write, root, resize), count(), groups), strict=True):
            parts.append(part)
            images += len(group)
            on_progress(images, len(listing.samples))
    bad = {name: reason for part in parts for name, reason in part.bad.items()}
    if bad and not skip_bad:
        raise _undecodable(folder, bad, len(listing.samples))
    return _write_index(root, listing.without(bad), parts, resize)


def _undecodable(folder: str, bad: dict[str, str], images: int) -> UserError:
    lines = [f"{printable(name)}: {reason}" for name, reason in list(bad.items())[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"and {len(bad) - LISTED:,} more")
    return UserError(
        f"{folder}: {len(bad):,} of {images:,} images cannot be decoded; repair or remove them, or give --skip-bad to "
        "leave them out; shards written so far are kept:" + "".join(f"\n  {line}" for line in lines)
    )


def _sources(listing: ImageListing) -> list[_Source]:
    sources = []
    for path, label in listing.samples:
        status = os.stat(path)
        name = PurePosixPath(Path(listing.name(path))).as_posix()
        sources.append(_Source(path, name, label, status.st_size, status.st_mtime_ns))
    return sources


def _groups(sources: Sequence[_Source], shard_mb: int, resize: int | None) -> Iterator[list[_Source]]:
    """The images of each shard, in order. The sizes of resized images are foreseen from a sample of them."""
    limit_bytes = shard_mb * 1e6 / _shrinkage(sources, resize)
    group: list[_Source] = []
    size = 0
    for source in sources:
        if group and size + source.bytes > limit_bytes:
            yield group
            group, size = [], 0
        group.append(source)
        size += source.bytes
    yield group


def _shrinkage(sources: Sequence[_Source], resize: int | None) -> float:
    """Bytes of resized images divided by those of their files."""
    if resize is None:
        return 1.0
    before = after = 1
    for source in sources[:: max(1, len(sources) // RATIO_SAMPLE)]:
        try:
            after += len(_encoded(source, resize)[1])
            before += source.bytes
        except (UserError, OSError):
            continue
    return after / before


def _encoded(source: _Source, resize: int | None) -> tuple[str, bytes]:
    """Name and content of an image in its shard.

    Raises:
        UserError: it cannot be decoded.
    """
    content = Path(source.path).read_bytes()
    pixels = decode_image(io.BytesIO(content), source.name)
    height, width = pixels.shape[1:]
    if resize is None or min(height, width) <= resize:
        return source.name, content
    scale = resize / min(height, width)
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    resized.save(stream, "JPEG", quality=JPEG_QUALITY)
    name = source.name if source.name.lower().endswith((".jpg", ".jpeg")) else f"{source.name}.jpg"
    return name, stream.getvalue()


def _write(root: Path, resize: int | None, number: int, group: Sequence[_Source]) -> _Part:
    """Write one shard, unless it is there, made of the same files."""
    files = [[source.name, source.label, source.bytes, source.changed_ns] for source in group]
    key = hashlib.sha256(json.dumps([resize, files]).encode()).hexdigest()
    record = root / PARTS / f"{number:05d}.json"
    if (part := _finished(root, record, key)) is not None:
        return part
    stream, rows, bad = io.BytesIO(), [], {}
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for source in group:
            try:
                name, content = _encoded(source, resize)
            except (UserError, OSError) as error:
                bad[source.name] = decode_reason(error.__cause__ or error)
                continue
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
            padded = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            rows.append((stream.tell() - padded, len(content), source.label, zlib.crc32(content)))
    content = stream.getvalue()
    name = f"shard-{number:05d}.tar"
    _put(root / name, content)
    part = _Part(key, asdict(Shard(name, len(content), hashlib.sha256(content).hexdigest())), rows, bad)
    write_text(record, json.dumps(asdict(part)))
    return part


def _finished(root: Path, record: Path, key: str) -> _Part | None:
    """What is recorded of a shard; None if it is not there, not whole, or made of other files."""
    try:
        part = _Part(**parse_object(retry_storage(lambda: get_text(record), record), PART_KEYS))
        path = root / part.shard["name"]
        size = retry_storage(lambda: path.stat().st_size, path)
    except (FileNotFoundError, NotADirectoryError, DamagedFile):
        return None
    return part if part.key == key and size == part.shard["bytes"] else None


def _write_index(root: Path, listing: ImageListing, parts: Sequence[_Part], resize: int | None) -> ShardHeader:
    rows = [(number, *row) for number, part in enumerate(parts) for row in part.rows]
    stream = io.BytesIO()
    np.save(stream, np.array(rows, ROW))
    _put(root / INDEX, stream.getvalue())
    header = ShardHeader(
        classes=listing.classes,
        num_train=listing.num_train,
        num_test=listing.num_test,
        skipped={name: reason for part in parts for name, reason in part.bad.items()},
        resize=resize,
        index_sha256=hashlib.sha256(stream.getvalue()).hexdigest(),
        shards=tuple(Shard(**part.shard) for part in parts),
    )
    write_text(root / HEADER, header.to_text())
    return header


def _put(path: Path, content: bytes) -> None:
    """Replace a file in one step, retried while the storage fails."""

    def put() -> None:
        if is_remote(path):
            remote: Any = path
            remote.fs.pipe_file(remote.path, content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_bytes(content)
        temporary.replace(path)

    retry_storage(put, path)
