"""Checks before a run or a study: resources, storage, MLflow server, data and teacher, here and on the other nodes.

Checks of this process alone import neither Ray nor torch, unless they need a GPU, read images or load a teacher.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wml_ray.config.schema import Config, DataConfig
from wml_ray.errors import UserError
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.storage.files import check_storage, put_text, storage_error
from wml_ray.storage.paths import missing_parents, remove_empty, to_path
from wml_ray.tracking.client import check_reachable, is_local_store, redacted, tracking_uri

if TYPE_CHECKING:
    from wml_ray.cluster.nodes import NodeReport


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: a sentence with what was found, or with what is wrong and how to correct it."""

    subject: str
    passed: bool
    text: str


def require_checks(config: Config, searching: bool = False) -> None:
    """Connect to the cluster, if one is needed, and check it for the run, or for a study's trials (`searching`).

    Raises:
        UserError: a check failed.
    """

    def checks() -> Iterator[CheckResult]:
        yield from _resource_checks(config, searching)
        if others := _other_nodes(config, searching):
            yield from _access_checks(config, searching, others)
        elif config.method.name in TEACHER_METHODS:
            yield run_check("teacher", partial(_check_teacher, config))

    for result in checks():
        if not result.passed:
            raise UserError(result.text)


def run_checks(config: Config, searching: bool = False) -> Iterator[CheckResult]:
    """All checks of `require_checks`, and those that `train` and `tune` make themselves; writes nothing that stays."""
    for result in _resource_checks(config, searching):
        yield result
        if result.subject == "cluster" and not result.passed:
            return
    for result in _access_checks(config, searching, _other_nodes(config, searching)):
        yield result
    if config.data.name == "imagefolder" and result.subject == "data" and result.passed:
        yield run_check("images", partial(_check_images, config.data))


def _needs_cluster(config: Config, searching: bool) -> bool:
    return searching or config.scale.workers != 0


def _resource_checks(config: Config, searching: bool) -> Iterator[CheckResult]:
    if not _needs_cluster(config, searching):
        yield run_check("resources", partial(_check_this_process, config))
        return
    from wml_ray.cluster.nodes import check_slots, connect

    connected = run_check("cluster", connect)
    yield connected
    if connected.passed:
        yield run_check("resources", partial(check_slots, config, searching))


def _access_checks(config: Config, searching: bool, others: Sequence[dict[str, Any]]) -> Iterator[CheckResult]:
    """Storage, MLflow, data and teacher, on this node and on the others that may run a worker; and equal versions."""
    uri = tracking_uri()
    reports: list[NodeReport] = []
    if others:
        from wml_ray.cluster.nodes import check_versions, reports_of

        try:
            with _marker_file(_storage_folder(config)) as marker:
                reports = reports_of(others, marker, config, "" if searching else uri)
        except UserError as error:
            yield CheckResult("nodes", False, str(error))
            return
        yield run_check("versions", partial(check_versions, reports))
    other_hosts = any(report.host != socket.gethostname() for report in reports)
    yield _with_reports(run_check("storage", partial(_check_writable, _storage_folder(config))), reports)
    mlflow = run_check("MLflow", partial(_check_tracking, uri, other_hosts and not searching))
    yield mlflow if searching else _with_reports(mlflow, reports)  # only the driver of a study logs
    yield _with_reports(run_check("data", partial(_check_data, config.data)), reports)
    if config.method.name in TEACHER_METHODS:
        yield _with_reports(run_check("teacher", partial(_check_teacher, config)), reports)


def _with_reports(result: CheckResult, reports: Sequence[NodeReport]) -> CheckResult:
    """The result for all nodes: the first failure, or success."""
    if not result.passed or not reports:
        return result
    for report in reports:
        if error := report.errors.get(result.subject):
            return CheckResult(result.subject, False, f"node {report.host}: {error}")
    return CheckResult(result.subject, True, f"{result.text} on {len(reports) + 1} nodes")


def _other_nodes(config: Config, searching: bool) -> list[dict[str, Any]]:
    if not _needs_cluster(config, searching):
        return []
    from wml_ray.cluster.nodes import other_nodes

    return other_nodes(config, searching)


def run_check(subject: str, check: Callable[[], object]) -> CheckResult:
    """Call `check`; a UserError is a failure, the text that it returns a success."""
    try:
        return CheckResult(subject, True, str(check()))
    except UserError as error:
        return CheckResult(subject, False, str(error))


def _check_this_process(config: Config) -> str:
    if not config.scale.gpu:
        return "this process"
    import torch

    if not torch.cuda.is_available():
        raise UserError("scale.gpu = true but this machine has no CUDA GPU; set scale.gpu=false")
    return f"this process and {torch.cuda.get_device_name()}"


def _check_writable(folder: Path) -> str:
    with _marker_file(folder):
        return f"{folder} can be written"


def _check_tracking(uri: str, other_hosts: bool) -> str:
    check_reachable(uri)
    if other_hosts and is_local_store(uri):
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{redacted(uri)}' is a file of this machine, but workers on others log "
            "to it; start an MLflow server and set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    return f"{redacted(uri)} answers"


def _check_data(config: DataConfig) -> str:
    from wml_ray.data.readers import check_dataset

    return f"{config.name} {check_dataset(config)}"


def _check_teacher(config: Config) -> str:
    from wml_ray.training.teacher import check_teacher

    return check_teacher(config)


def _check_images(config: DataConfig) -> str:
    from wml_ray.data.check import undecodable_images

    if bad := undecodable_images(config):
        return f"{len(bad):,} cannot be decoded and are left out (data.skip_bad=true)"
    return "every header is intact, and a sample can be decoded"


def _storage_folder(config: Config) -> Path:
    return to_path(config.run.storage_path).resolve()


@contextmanager
def _marker_file(folder: Path) -> Iterator[Path]:
    """A file in the storage, for the checks of other nodes. It is removed at the end, with the folders made for it.

    Raises:
        UserError: the folder cannot be written.
    """
    check_storage(folder)
    marker = folder / f".preflight-{uuid.uuid4().hex}"
    created = missing_parents(folder)
    try:
        put_text(marker, "")
    except Exception as error:  # any error of a storage's client
        raise storage_error(folder, error) from None
    try:
        yield marker
    finally:
        with suppress(OSError):  # another process may use the folder by now
            marker.unlink(missing_ok=True)
            remove_empty(created)
