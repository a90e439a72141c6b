"""Reads of shards, and the local copies of those in remote storage: at most `data.cache_gb` a node."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from filelock import FileLock

from wml_ray.errors import UserError, one_line, root_cause
from wml_ray.storage.paths import is_remote, to_path
from wml_ray.storage.retry import retry_storage

LOCK_POLL_S = 2.0  # between two looks whether another process still fills the cache
PARTIAL = ".partial"
CACHE_FOLDER = "wml_ray-shards"  # of all sets, below data.cache_path; other files there are left alone


@dataclass(frozen=True)
class Shard:
    """A tar file of a set: its name below the root, its size in bytes and its digest."""

    name: str
    bytes: int
    sha256: str


def read_file(root: str, name: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes from `start` to `stop` of a file below `root`; all of them by default. Remote ones take one request.

    Raises:
        UserError: the file is missing.
        StorageUnavailable: the storage failed for ten minutes.
    """
    folder = _folder(root, os.getpid())
    try:
        return retry_storage(lambda: _read(folder, name, start, stop), folder)
    except ImportError as error:
        raise UserError(f"data.root = '{root}' needs a package ({one_line(error)}); for s3 wml_ray[s3]") from None
    except FileNotFoundError:
        raise UserError(
            f"data.root = '{root}': {name} is missing; write the set with `wml-ray shard`, or name another"
        ) from None


@lru_cache(maxsize=16)
def _folder(root: str, process_id: int) -> Path:
    """`root` as a path; one a process, as the clients of storages do not survive a fork."""
    return to_path(root)


def _read(folder: Path, name: str, start: int | None, stop: int | None) -> bytes:
    if is_remote(folder):
        remote: Any = folder
        return bytes(remote.fs.cat_file(f"{remote.path.rstrip('/')}/{name}", start=start, end=stop))
    return _read_local(folder / name, start, stop)


def _read_local(path: Path, start: int | None, stop: int | None) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start or 0)
        return file.read() if stop is None else file.read(stop - (start or 0))


class ShardCache:
    """Local copies of the first shards of a remote set, as many as fit into the limit; none of a local set.

    Which shards are kept follows from their sizes alone: nothing is evicted while a set is used, as random access to
    a set larger than its cache would fetch a whole shard for every image. The images of other shards, and of those
    that are not here yet, are read one by one.
    """

    def __init__(self, root: str, digest: str, shards: Sequence[Shard], folder: str, limit_bytes: int) -> None:
        """`digest` names this version of the set in the cache folder, which the sets of a node share."""
        self.root, self.shards, self.limit_bytes = root, shards, limit_bytes
        self.parent = Path(folder).expanduser() / CACHE_FOLDER
        self.folder = self.parent / digest[:16]
        ends = accumulate(shard.bytes for shard in shards)
        self.kept = sum(end <= limit_bytes for end in ends) if is_remote(to_path(root)) else 0
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None

    def read(self, number: int, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of a shard, from its local copy if there is one.

        Raises:
            UserError: the shard is missing.
            StorageUnavailable: the storage failed for ten minutes.
        """
        name = self.shards[number].name
        if number < self.kept:
            try:
                return _read_local(self.folder / name, start, stop)
            except FileNotFoundError:
                pass  # not fetched yet, or removed
        return read_file(self.root, name, start, stop)

    def start(self) -> None:
        """Fetch the missing shards in a thread, which waits while another process of this node fills the cache."""
        if self.kept and self._thread is None:
            self._thread = threading.Thread(target=self._fill, name="shard-cache", daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Check what the thread of `start` has fetched so far.

        Raises:
            UserError: a shard was damaged or missing, or the storage failed for ten minutes.
        """
        if self._error:
            raise self._error

    def fill(self) -> None:
        """Fetch and verify the missing shards. Copies of other sets are removed, the oldest first, for room.

        Raises:
            UserError: a shard is damaged or missing.
            StorageUnavailable: the storage failed for ten minutes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.parent / ".lock", poll_interval=LOCK_POLL_S):
            self._make_room()
            for shard in self.shards[: self.kept]:
                self._fetch(shard)

    def _fill(self) -> None:
        try:
            self.fill()
        except UserError as error:
            self._error = error
        except OSError as error:  # of the local disk; images are read from the storage instead
            warnings.warn(f"data.cache_path: {self.parent} cannot be written ({root_cause(error)})", stacklevel=1)

    def _fetch(self, shard: Shard) -> None:
        path = self.folder / shard.name
        if path.exists() and path.stat().st_size == shard.bytes:
            return
        content = read_file(self.root, shard.name)
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise UserError(
                f"data.root = '{self.root}': {shard.name} is damaged (it differs from the digest in the index); write "
                "it again with `wml-ray shard`"
            )
        temporary = path.with_name(shard.name + PARTIAL)
        temporary.write_bytes(content)
        temporary.replace(path)

    def _make_room(self) -> None:
        """Remove files that are not kept, then other sets, until this set fits."""
        os.utime(self.folder)
        names = {shard.name for shard in self.shards[: self.kept]}
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink()
        own = sum(shard.bytes for shard in self.shards[: self.kept])
        others = [path for path in self.parent.iterdir() if path.is_dir() and path != self.folder]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in others}
        for path in sorted(others, key=lambda path: path.stat().st_mtime):
            if own + sum(sizes.values()) <= self.limit_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]
