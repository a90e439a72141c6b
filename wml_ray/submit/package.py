"""The working directory that is sent with a job: the code, the job itself, and the variables passed on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wml_ray.errors import UserError
from wml_ray.storage.files import STORAGE_VARIABLES
from wml_ray.submit.entry import ENVIRONMENT_FILE
from wml_ray.submit.job import Job
from wml_ray.tracking.client import TRACKING_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    *("wml_ray/**/*.py", "jobs/*.py", "jobs/*.yaml", "jobs/*.csv", "tune_spaces/*.py"),
    *("pyproject.toml", "requirements.lock", "README.md"),
)
JOB_FILE = "job.json"
PASSED_ON = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "OPTUNA_STORAGE"),
    *TRACKING_VARIABLES,
    *STORAGE_VARIABLES,
)
MAX_BYTES = 50 * 10**6


@dataclass(frozen=True)
class Package:
    """The working directory of a job, as a folder that Ray packs and uploads."""

    folder: Path
    num_files: int
    size_bytes: int


def passed_environment(job: Job) -> dict[str, str]:
    """The variables of this process that the job needs, secrets among them."""
    environment = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    if job.search and job.search.storage:
        environment["OPTUNA_STORAGE"] = job.search.storage
    return environment


def write_package(job: Job, folder: Path, include: Sequence[str] = (), root: Path = ROOT) -> Package:
    """Copy the code under `root`, the user's own functions and the paths of `include` to `folder`, and add job.json.

    A path of `include` keeps its name relative to the current directory, or only its last part if it is elsewhere.

    Raises:
        UserError: a file cannot be read, or all are larger than a job's working directory should be.
    """
    try:
        files = {str(path.relative_to(root)): path for pattern in CODE for path in sorted(root.glob(pattern))}
        files |= own_modules(job.config.user_functions)
        for given in include:
            files |= _files_of(Path(given))
        size_bytes = _check_size(files)
        for name, path in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be sent to the cluster: {error.strerror}") from None
    (folder / JOB_FILE).write_text(job.to_json())
    if environment := passed_environment(job):
        path = folder / ENVIRONMENT_FILE
        path.touch(0o600)  # Ray keeps the mode on the nodes
        path.write_text(json.dumps(environment, sort_keys=True))
    return Package(folder, len(files) + 1, size_bytes)


def own_modules(functions: Mapping[str, str]) -> dict[str, Path]:
    """The files of the modules or packages that hold a user's own functions, by config key, unless installed.

    Raises:
        UserError: one cannot be imported.
    """
    files: dict[str, Path] = {}
    for key, name in functions.items():
        from wml_ray.networks.backbones import import_function

        import_function(name, key)
        files |= _own_files(name.partition(":")[0])
    return files


def _own_files(module_name: str) -> dict[str, Path]:
    parts = module_name.split(".")
    for depth in range(1, len(parts) + 1):
        file = sys.modules[".".join(parts[:depth])].__file__
        if file and not {"site-packages", "dist-packages"} & set(Path(file).parts):
            path = Path(file).parent if Path(file).name == "__init__.py" else Path(file)
            return _files_of(path, "/".join([*parts[: depth - 1], path.name]))
        if file:
            return {}
    return {}


def _files_of(path: Path, name: str | None = None) -> dict[str, Path]:
    """A file, or every file of a folder but hidden and compiled ones, under their names in the package."""
    path = path.resolve(strict=True)
    if name is None:
        name = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    if path.is_file():
        return {name: path}
    files: dict[str, Path] = {}
    for child in sorted(path.iterdir()):
        if not child.name.startswith(".") and child.name != "__pycache__":
            files |= _files_of(child, str(Path(name) / child.name))
    return files


def _check_size(files: Mapping[str, Path]) -> int:
    """The bytes of all files.

    Raises:
        UserError: they are too many.
    """
    sizes: Counter[str] = Counter()
    for name, path in files.items():
        sizes[Path(name).parts[0]] += path.stat().st_size
    if sizes.total() > MAX_BYTES:
        largest, size_bytes = sizes.most_common(1)[0]
        raise UserError(
            f"the job has {sizes.total() / 1e6:.0f} MB to send to the cluster, most of it in {largest} "
            f"({size_bytes / 1e6:.0f} MB); at most {MAX_BYTES / 1e6:.0f} MB are sent: --include less, or put large "
            "files where all nodes can read them"
        )
    return sizes.total()
