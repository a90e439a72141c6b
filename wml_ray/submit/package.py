"""What is sent to a cluster: a run or a study as a job's command, and the working directory it comes with."""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from wml_ray.cli.options import parse_arguments, search_settings
from wml_ray.config.load import load_config
from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.storage.files import STORAGE_VARIABLES
from wml_ray.storage.paths import to_path
from wml_ray.submit.entry import ENVIRONMENT
from wml_ray.tracking.client import TRACKING_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
PASSED_ON = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "OPTUNA_STORAGE"),
    *TRACKING_VARIABLES,
    *STORAGE_VARIABLES,
)
LEFT_OUT = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "node_modules"),
    *("mlruns", "mlartifacts", "*.db", "*.db-*", "*.sqlite*"),
)
LEFT_OUT_AT_TOP = ("results", "data", "outputs", "reports", "tests", "docs", "deploy", "benchmarks", "build")
MAX_BYTES = 50 * 10**6


@dataclass(frozen=True)
class Work:
    """A run or a study that a cluster is asked for, checked on this machine."""

    name: str  # run id, or the study's name: the job is called so
    folder: str  # no two jobs may work in it
    verb: str
    config: Config
    words: list[str]  # arguments of the verb, with the names its files have in the package
    files: dict[str, Path]  # those files
    environment: dict[str, str]  # passed on to the job, secrets among it


@dataclass(frozen=True)
class Package:
    """The working directory of a job, as one zip file."""

    path: Path
    files: int
    size_bytes: int


def work_of(verb: str, words: Sequence[str], root: Path = ROOT) -> Work:
    """Raises:
    UserError: a mistake in the config, the space or the settings of the search.
    """
    options = parse_arguments([verb, *words])
    config = load_config(options.config, options.overrides)
    environment = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    command, files = list(words), {}
    for kind in ("config", "space", "start"):
        given = getattr(options, kind, None)
        if given and "://" not in given:
            path = Path(given).resolve()
            name = str(path.relative_to(root)) if path.is_relative_to(root) else f"submitted/{kind}/{path.name}"
            files[name] = path
            command = [_replaced(word, given, name) for word in command]
    if verb == "train":
        return Work(config.run_id, str(config.run_folder), verb, config, command, files, environment)
    study = _checked_study(options, config)
    if options.storage:  # a command line is there for all to read, and the address may hold a password
        environment["OPTUNA_STORAGE"] = options.storage
        command = _without_option(command, options.storage)
    if not options.study:
        command += ["--study", study]
    return Work(study, str(to_path(config.run.storage_path) / study), verb, config, command, files, environment)


def _checked_study(options: Any, config: Config) -> str:
    """Name of the study, after all that can be checked without a cluster."""
    from wml_ray.cluster.space import load_space
    from wml_ray.search.space import check_stop_metric, load_start_points

    space = load_space(options.space, config)
    search = search_settings(options, config)
    check_stop_metric(search, space)
    if options.start:
        load_start_points(Path(options.start), space)
    return search.study


def _replaced(word: str, given: str, name: str) -> str:
    option, equals, value = word.partition("=")
    if word.startswith("--") and equals and value == given:
        return f"{option}={name}"
    return name if word == given else word


def _without_option(words: Sequence[str], value: str) -> list[str]:
    """`words` without the option that has this value, in one word or in two."""
    kept: list[str] = []
    for word in words:
        if word == value and kept and kept[-1].startswith("--"):
            kept.pop()
        elif not (word.startswith("--") and word.endswith(f"={value}")):
            kept.append(word)
    return kept


def pack(work: Work, target: Path, exclude: Sequence[str] = (), root: Path = ROOT) -> Package:
    """Write the job's working directory to the zip file `target`: the code and the files of the work, nothing else.

    The same content gives the same bytes, so that Ray uploads it once.

    Raises:
        UserError: it is larger than a job's working directory should be.
    """
    outputs = {Path(work.config.run.storage_path).resolve(), Path(work.config.data.root).resolve()}
    files = {str(path.relative_to(root)): path for path in _code(root, outputs, exclude)} | work.files
    size_bytes = sum(path.stat().st_size for path in files.values())
    if size_bytes > MAX_BYTES:
        largest, its_bytes = _largest(files)
        raise UserError(
            f"{root} has {size_bytes / 1e6:.0f} MB to send to the cluster, most of it in {largest} "
            f"({its_bytes / 1e6:.0f} MB); at most {MAX_BYTES / 1e6:.0f} MB are sent: move it elsewhere, or leave it "
            f"out with --exclude {largest}"
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            _add(archive, name, path.read_bytes(), 0o755 if os.access(path, os.X_OK) else 0o644)
        if work.environment:
            _add(archive, ENVIRONMENT, json.dumps(work.environment, sort_keys=True).encode(), 0o600)
    return Package(target, len(files), target.stat().st_size)


def _add(archive: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name)  # dated 1980, whenever it is packed
    entry.external_attr = mode << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


def _code(root: Path, outputs: set[Path], exclude: Sequence[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        patterns = (*LEFT_OUT, *exclude, *(LEFT_OUT_AT_TOP if here == root else ()))

        def kept(name: str, here: Path = here, patterns: tuple[str, ...] = patterns) -> bool:
            return not any(fnmatch(name, pattern) for pattern in patterns) and (here / name).resolve() not in outputs

        folders[:] = [name for name in folders if kept(name) and not _is_environment(here / name)]
        yield from (here / name for name in names if kept(name) and (here / name).is_file())


def _is_environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").exists()


def _largest(files: Mapping[str, Path]) -> tuple[str, int]:
    """The folder at the top, or the file, that weighs most."""
    sizes: Counter[str] = Counter()
    for name, path in files.items():
        sizes[Path(name).parts[0]] += path.stat().st_size
    return sizes.most_common(1)[0]
