"""Finished runs by folder, address or id."""

from __future__ import annotations

from pathlib import Path

from wml_ray.storage.paths import is_remote, to_path
from wml_ray.storage.retry import retry_storage

RESULT = "result.json"


def find_run(run: str, storage_path: str) -> Path | None:
    """The folder of a run, given as a folder, an address, or a run id that is looked up as `<storage_path>/*/<id>`.

    Of several runs with the id, which differ in nothing but their experiment, a finished one is preferred. None if
    there is no such run; an address is returned unchecked.

    Raises:
        StorageUnavailable: the storage failed for ten minutes.
        UserError: the protocol of an address is unknown.
    """
    folder = to_path(run)
    if is_remote(folder) or folder.is_dir():
        return folder
    if "/" in run:
        return None
    storage = to_path(storage_path)
    found = retry_storage(lambda: _runs_below(storage, run), storage)
    return max(found, key=lambda folder: (folder / RESULT).exists(), default=None)


def absolute_run(run: str, storage_path: str) -> str:
    """The run as the absolute folder or address that `find_run` gives, or unchanged if there is none."""
    folder = find_run(run, storage_path)
    return run if folder is None else str(folder.resolve())


def _runs_below(storage: Path, run_id: str) -> list[Path]:
    if not storage.is_dir():
        return []
    return [folder / run_id for folder in sorted(storage.iterdir()) if (folder / run_id).is_dir()]
