"""Files of runs in a local folder or in remote storage such as s3://bucket/folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from wml_ray.errors import UserError, one_line, root_cause
from wml_ray.storage.paths import is_remote
from wml_ray.storage.retry import retry_storage

STORAGE_VARIABLES = (  # the address and the credentials of a storage; profiles and roles are set on each node
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)


class DamagedFile(ValueError):
    """The content of a file is not what was written."""


def check_storage(folder: Path) -> None:
    """Check that a remote storage can be reached; a local folder is not checked.

    Raises:
        UserError: the storage's client is not installed, or the storage refuses the request.
    """
    if not is_remote(folder):
        return
    try:
        folder.exists()
    except ImportError as error:
        needed = "the s3fs package: pip install 'wml_ray[s3]'"
        if not str(folder).startswith("s3://"):
            needed = f"a package: {one_line(error)}"
        raise UserError(f"run.storage_path = '{folder}' needs {needed}") from None
    except Exception as error:  # of any client library
        raise storage_error(folder, error) from None


def storage_error(folder: Path, error: Exception) -> UserError:
    """The error of a run whose storage cannot be written at the start."""
    remedy = "check its bucket, AWS_ENDPOINT_URL and the AWS_* credentials" if is_remote(folder) else ""
    return UserError(
        f"run.storage_path: {folder} cannot be written ({root_cause(error)}); {remedy or 'name a folder that can'}"
    )


def write_text(path: Path, text: str) -> None:
    """`put_text`, retried while the storage fails.

    Raises:
        StorageUnavailable: the storage failed for ten minutes.
    """
    retry_storage(lambda: put_text(path, text), path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1))


def put_text(path: Path, text: str) -> None:
    """Replace a file in one step, so that readers see the old text or the new; missing folders are made.

    The text of a local file is on the disk when this returns.
    """
    if is_remote(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


def get_text(path: Path) -> str:
    """The text of a file.

    A remote file is read in one request: `open` takes two, and fails if the file is replaced between them.

    Raises:
        DamagedFile: it is no text.
    """
    try:
        if is_remote(path):
            remote: Any = path
            return bytes(remote.fs.cat_file(remote.path)).decode()
        check_regular(path)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"it is no text: {error}") from None


def check_regular(path: Path) -> None:
    """Check that a local file can be opened without blocking. Symbolic links are followed.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is a folder, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise UserError(f"{path} is not a regular file; remove it or restore the file")


def digest_of(path: Path) -> str:
    """The SHA-256 of a local file; it is computed again only after the file has changed.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    return _digest_of(path.resolve(), status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=64)
def _digest_of(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Write the buffers of a local file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, remedy: str, keys: Sequence[str] = ()) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file.

    Raises:
        UserError: the file is empty, cut short, or lacks one of `keys`; the message ends in `remedy`.
        StorageUnavailable: the storage failed for ten minutes.
    """
    try:
        return parse_object(retry_storage(lambda: get_text(path), path), keys)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedFile as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def parse_object(text: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        DamagedFile: the text is no object, or one without one of `keys`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile("it is empty" if not text.strip() else one_line(error)) from None
    if not isinstance(value, dict):
        raise DamagedFile("it holds no object")
    for key in keys:
        if key not in value:
            raise DamagedFile(f"it lacks '{key}'")
    return value


@contextmanager
def local_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A local folder with these files of `folder`: `folder` itself, or a temporary one they are downloaded to.

    Raises:
        FileNotFoundError: a remote file does not exist.
        StorageUnavailable: the storage failed for ten minutes.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="wml_ray-") as temporary:
        for name in names:
            retry_storage(lambda: _download(folder / name, Path(temporary) / name), folder)  # noqa: B023  called at once
        yield Path(temporary)


def remove_tree(folder: Path) -> None:
    """Remove a folder if it exists; local files that cannot be removed are left."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        remote: Any = folder
        remote.fs.rm(remote.path, recursive=True)


def storage_environment() -> dict[str, str]:
    """The environment variables that storage clients read, for processes on other nodes."""
    return {name: os.environ[name] for name in STORAGE_VARIABLES if name in os.environ}


def _download(source: Any, target: Path) -> None:
    source.fs.get_file(source.path, str(target))
