"""Local paths and addresses such as s3://bucket/folder, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from wml_ray.errors import UserError

_STORAGE_OPTIONS: dict[str, Any] = {"use_listings_cache": False}  # other processes write there too
_OPTIONS_OF: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"connect_timeout": 5}}}


def to_path(path: str | Path) -> Path:
    """The local path, or the object with the same methods for an address such as s3://bucket/folder.

    Raises:
        UserError: the protocol of the address is unknown.
    """
    if "://" not in str(path):
        return Path(path)
    from upath import UPath

    try:
        return cast(Path, UPath(path, **_STORAGE_OPTIONS, **_OPTIONS_OF.get(str(path).partition("://")[0], {})))
    except ValueError as error:
        raise UserError(
            f"'{path}' is no address of a storage ({error}); write s3://BUCKET/FOLDER, or a folder"
        ) from None


def is_remote(path: Path) -> bool:
    """Whether files below `path` must be uploaded and downloaded, as no file system contains them."""
    return not isinstance(path, Path)


def missing_parents(folder: Path) -> list[Path]:
    """Those of `folder` and its parents that do not exist, innermost first; none in remote storage."""
    return [] if is_remote(folder) else [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of the folders that are empty, in this order."""
    for folder in folders:
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()
