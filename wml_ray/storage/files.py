"""Files where runs are kept: in a folder of this machine, or in one behind an address such as s3://bucket/folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wml_ray.errors import UserError, root_cause
from wml_ray.storage.paths import is_remote
from wml_ray.storage.retry import retry_storage

STORAGE_VARIABLES = (  # where a storage is and who may write there; profiles and roles are each node's own
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)


def check_storage(folder: Path) -> None:
    """Raises:
    UserError: the storage's client is not installed, or the storage does not answer.
    """
    if not is_remote(folder):
        return
    try:
        folder.exists()
    except ImportError as error:
        needed = "the s3fs package: pip install 'wml_ray[s3]'"
        if not str(folder).startswith("s3://"):
            needed = f"a package: {' '.join(str(error).split())}"
        raise UserError(f"run.storage_path = '{folder}' needs {needed}") from None
    except Exception as error:  # whatever a client library raises: it is reported, not hidden
        raise storage_error(folder, error) from None


def storage_error(folder: Path, error: Exception) -> UserError:
    """What to say of a storage that cannot be used from the start."""
    mend = "check its bucket, AWS_ENDPOINT_URL and the AWS_* credentials" if is_remote(folder) else ""
    return UserError(
        f"run.storage_path: {folder} cannot be written ({root_cause(error)}); {mend or 'name a folder that can'}"
    )


def write_text(path: Path, text: str) -> None:
    """Write a file that readers see whole or not at all, as soon as the storage takes it.

    Raises:
        StorageUnavailable: it did not take it for ten minutes.
    """
    retry_storage(lambda: put_text(path, text), path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1))


def put_text(path: Path, text: str) -> None:
    """`write_text`, tried once. A put of an object is atomic by itself; a file is written beside and renamed."""
    if is_remote(path):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    beside.write_text(text)
    flush(beside)
    beside.replace(path)


def get_text(path: Path) -> str:
    """What a file says at one moment, tried once.

    Opened, an object would be read in two steps, and refused in the second if it was replaced between them.
    """
    if is_remote(path):
        remote: Any = path
        return bytes(remote.fs.cat_file(remote.path)).decode()
    return path.read_text()


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file says, None where there is none.

    Raises:
        StorageUnavailable: the storage did not answer for ten minutes.
    """
    try:
        return dict(json.loads(retry_storage(lambda: get_text(path), path)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def put_files(source: Path, names: Sequence[str], target: Path) -> None:
    """Upload files of a local folder, in this order."""
    for name in names:
        remote: Any = target / name
        remote.fs.put_file(str(source / name), remote.path)


@contextmanager
def local_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A local folder with these files of `folder`: itself, or one they are downloaded to.

    Raises:
        FileNotFoundError: a file is not there.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="wml_ray-") as here:
        for name in names:
            retry_storage(lambda: _get_file(folder / name, Path(here) / name), folder)  # noqa: B023  called at once
        yield Path(here)


def remove_tree(folder: Path) -> None:
    """Remove a folder, if it is there. On this machine what cannot be removed stays."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        remote: Any = folder
        remote.fs.rm(remote.path, recursive=True)


def missing_parents(folder: Path) -> list[Path]:
    """The folder and its parents that a file in it will need, innermost first; remote storage needs none."""
    return [] if is_remote(folder) else [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of the folders, innermost first, that nobody has begun to use."""
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def staging_folder(folder: Path) -> Path:
    """An empty local folder that belongs to `folder`; what a process that was killed left in it is gone."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    here = Path(tempfile.gettempdir()) / f"wml_ray-{os.getuid()}-{name}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(mode=0o700)
    return here


def storage_environment() -> dict[str, str]:
    """What a storage's client reads, for processes on other nodes."""
    return {name: os.environ[name] for name in STORAGE_VARIABLES if name in os.environ}


def flush(path: Path) -> None:
    """Have a local file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _get_file(source: Any, target: Path) -> None:
    source.fs.get_file(source.path, str(target))
