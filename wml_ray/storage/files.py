"""Files where runs are kept: in a folder of this machine, or in one behind an address such as s3://bucket/folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from wml_ray.config import UserError
from wml_ray.delivery import RETRY_S, first_cause

VARIABLES = (  # where a storage is and who may write there; profiles and roles are each node's own
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
)
PATIENCE_S = 600.0  # how long a run waits for a storage that went away
LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # of a file system
T = TypeVar("T")


class Unanswered(UserError):
    """The storage went away and did not come back."""


def is_remote(path: Path) -> bool:
    """Whether files there are reached by uploads and downloads; all else is a file system to the programs."""
    return not isinstance(path, Path)


def check(folder: Path) -> None:
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
        raise unusable(folder, error) from None


def unusable(folder: Path, error: Exception) -> UserError:
    """What to say of a storage that cannot be used from the start."""
    mend = "check its bucket, AWS_ENDPOINT_URL and the AWS_* credentials" if is_remote(folder) else ""
    return UserError(
        f"run.storage_path: {folder} cannot be written ({first_cause(error)}); {mend or 'name a folder that can'}"
    )


def patiently(call: Callable[[], T], path: Path) -> T:
    """A call that the storage may refuse for a while.

    Raises:
        OSError: as `call` does, if waiting does not help.
        Unanswered: the storage refused it for ten minutes.
    """
    failures = Exception if is_remote(path) else OSError  # whatever a client library raises
    lasting = (UserError, FileNotFoundError) if is_remote(path) else (UserError, *LASTING)
    deadline_s = time.monotonic() + PATIENCE_S
    warned = False
    while True:
        try:
            return call()
        except lasting:
            raise
        except failures as error:
            if time.monotonic() > deadline_s:
                raise unanswered(path, first_cause(error)) from None
            if not warned:
                warned = True
                warnings.warn(f"{path}: the storage fails ({first_cause(error)}); trying again", stacklevel=2)
            time.sleep(RETRY_S)


def unanswered(path: Path, cause: str) -> Unanswered:
    """What to say of it, in one sentence."""
    return Unanswered(
        f"{path}: the storage fails ({cause}); run the same command again when it works: it goes on from the newest "
        "checkpoint there"
    )


def write_text(path: Path, text: str) -> None:
    """Write a file that readers see whole or not at all, as soon as the storage takes it.

    Raises:
        Unanswered: it did not take it for ten minutes.
    """
    patiently(lambda: put_text(path, text), path)


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
        Unanswered: the storage did not answer for ten minutes.
    """
    try:
        return dict(json.loads(patiently(lambda: get_text(path), path)))
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
            patiently(lambda: _get_file(folder / name, Path(here) / name), folder)  # noqa: B023  called at once
        yield Path(here)


def remove_tree(folder: Path) -> None:
    """Remove a folder, if it is there. On this machine what cannot be removed stays."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        remote: Any = folder
        remote.fs.rm(remote.path, recursive=True)


def missing(folder: Path) -> list[Path]:
    """The folder and its parents that a file in it will need, innermost first; remote storage needs none."""
    return [] if is_remote(folder) else [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of the folders, innermost first, that nobody has begun to use."""
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def scratch(folder: Path) -> Path:
    """An empty local folder that belongs to `folder`; what a process that was killed left in it is gone."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    here = Path(tempfile.gettempdir()) / f"wml_ray-{os.getuid()}-{name}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(mode=0o700)
    return here


def environment() -> dict[str, str]:
    """What a storage's client reads, for processes on other nodes."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def flush(path: Path) -> None:
    """Have a local file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _get_file(source: Any, target: Path) -> None:
    source.fs.get_file(source.path, str(target))
