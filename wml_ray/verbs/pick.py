"""The verb `pick` as a function: the networks of finished runs that fit a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wml_ray.errors import UserError
from wml_ray.report.choosing import Candidate, Limits, candidates_of, fitting
from wml_ray.storage.files import read_json
from wml_ray.storage.paths import to_path
from wml_ray.storage.retry import retry_storage
from wml_ray.storage.runs import RESULT, find_run

RUN_KEYS = ("peers", "tree", "predictions")
REMEDY = "delete it: the run then ends anew from its last checkpoint"


def pick(names: Sequence[str], limits: Limits, storage_path: str = "results") -> list[Candidate]:
    """Every peer and ensemble of the named runs that is within the limits, the most accurate on validation first.

    A name is a run (folder, address or run id), or an experiment or a study: all finished runs of it below
    `storage_path`. Only the runs' result.json files are read.

    Raises:
        UserError: a name is unknown, nothing has finished, or nothing is within the limits.
    """
    folders = dict.fromkeys(folder for name in names for folder in _finished(name, storage_path))
    found: list[Candidate] = []
    for folder in folders:
        result = read_json(folder / RESULT, REMEDY, RUN_KEYS)
        if result is not None:
            found += candidates_of(result, folder)
    return fitting(found, limits)


def _finished(name: str, storage_path: str) -> list[Path]:
    """The folders of the finished runs that a name stands for."""
    folder = find_run(name, storage_path)
    if folder is None:
        folder = to_path(storage_path) / name
        if "/" in name or not retry_storage(folder.is_dir, folder):
            raise UserError(
                f"there is no run, experiment or study '{name}' below {storage_path}; give the folder of a run, or "
                "--storage-path"
            )
    patterns = ("", "*/", "trials/*/*/")
    runs = [
        result.parent
        for pattern in patterns
        for result in retry_storage(lambda pattern=pattern: sorted(folder.glob(f"{pattern}{RESULT}")), folder)  # type: ignore[misc]
    ]
    if not runs:
        raise UserError(f"no run of {name} has finished; wait, or train one with wml-ray train")
    return runs
