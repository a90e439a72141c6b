"""What would stop a run on this cluster, found before hours are spent on it."""

from __future__ import annotations

import os
import platform
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wml_ray.cluster.connect import join_cluster, with_absolute_paths
from wml_ray.cluster.resources import check_capacity, slots_of_node, trial_resources, worker_range, worker_resources
from wml_ray.config.schema import Config, DataConfig
from wml_ray.data.check import undecodable_images
from wml_ray.data.readers import check_dataset
from wml_ray.errors import UserError, root_cause
from wml_ray.storage.files import (
    check_storage,
    missing_parents,
    put_text,
    remove_empty,
    storage_environment,
    storage_error,
)
from wml_ray.storage.paths import to_path
from wml_ray.tracking.client import check_reachable, is_local_store, redacted, tracking_environment, tracking_uri

NODE_TIMEOUT_S = 120.0  # how long a node may take to start a process that imports torch, and to look
PACKAGES = ("ray", "torch", "torchvision", "torch-pruning", "safetensors", "mlflow")


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at: what was found, or what is wrong and how to mend it."""

    subject: str
    fine: bool
    text: str


@dataclass(frozen=True)
class NodeReport:
    """What one node says of itself; each of the last three is empty or says what is wrong."""

    host: str
    versions: dict[str, str]
    storage: str
    tracking: str
    data: str


def require_checks(config: Config, searching: bool = False) -> None:
    """Join the cluster, if there is to be one, and see that it has what the run, or the trials of a study, need.

    Raises:
        UserError: it has not.
    """
    for finding in _room(config, searching):
        _insist(finding)
    if others := _other_nodes(config, searching):
        for finding in _places(config, searching, others):
            _insist(finding)


def run_checks(config: Config, searching: bool = False) -> Iterator[CheckResult]:
    """Everything `check` insists on, and what else would stop the run; good and bad, and nothing is left behind."""
    yield from _room(config, searching)
    if not _on_cluster(config, searching) or ray.is_initialized():
        yield from _places(config, searching, _other_nodes(config, searching))
    if config.data.name == "imagefolder":
        yield _found("images", partial(_decodable, config.data))


def _room(config: Config, searching: bool) -> Iterator[CheckResult]:
    if not _on_cluster(config, searching):
        yield _found("resources", partial(_this_process, config))
        return
    joined = _found("cluster", _cluster)
    yield joined
    if joined.fine:
        workers = max(worker_range(config)[0], 1)
        yield _found("resources", partial(check_capacity, workers, _wanted(config, searching)))


def _places(config: Config, searching: bool, others: list[dict[str, Any]]) -> Iterator[CheckResult]:
    """What must be at hand wherever a worker may run: on this node, then on all others."""
    uri = tracking_uri()
    try:
        answers = _ask(others, config, "" if searching else uri) if others else []
    except UserError as error:
        yield CheckResult("nodes", False, str(error))
        return
    everywhere = f" on {len(others) + 1} nodes" if others else ""
    elsewhere = any(answer.host != socket.gethostname() for answer in answers)
    if others:
        yield _found("versions", partial(_alike, answers))
    checks: tuple[tuple[str, Callable[[], str], str], ...] = (
        ("storage", partial(_writable, config), "storage"),
        ("MLflow", partial(_reachable, uri, elsewhere and not searching), "tracking"),
        ("data", partial(_data, config.data), "data"),
    )
    for subject, here, there in checks:
        finding = _found(subject, here)
        wrong = [f"node {answer.host}: {text}" for answer in answers if (text := getattr(answer, there))]
        if finding.fine and wrong:
            finding = CheckResult(subject, False, wrong[0])
        shared = everywhere if finding.fine and not (subject == "MLflow" and searching) else ""
        yield CheckResult(subject, finding.fine, finding.text + shared)


def _on_cluster(config: Config, searching: bool) -> bool:
    return searching or config.scale.workers != 0


def _wanted(config: Config, searching: bool) -> dict[str, float]:
    """What each worker takes of a node."""
    return trial_resources(config) if searching else worker_resources(config)


def _found(subject: str, look_at: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(subject, True, look_at())
    except UserError as error:
        return CheckResult(subject, False, str(error))


def _insist(finding: CheckResult) -> None:
    if not finding.fine:
        raise UserError(finding.text)


def _this_process(config: Config) -> str:
    if config.scale.gpu and not torch.cuda.is_available():
        raise UserError("scale.gpu = true but this machine has no CUDA GPU; set scale.gpu=false")
    return "this process" + (f" and {torch.cuda.get_device_name()}" if config.scale.gpu else "")


def _cluster() -> str:
    join_cluster()
    total, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
    count = f"{len(nodes)} node{'s' * (len(nodes) > 1)}"
    return f"{count}, {total.get('CPU', 0):.0f} CPU cores, {total.get('GPU', 0):.0f} GPUs"


def _writable(config: Config) -> str:
    folder = _folder(config)
    with _marker(folder):
        return f"{folder} can be written"


def _reachable(uri: str, from_elsewhere: bool) -> str:
    check_reachable(uri)
    if from_elsewhere and is_local_store(uri):
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{redacted(uri)}' is a file of this machine, but workers on others log "
            "to it; start an MLflow server and set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    return f"{redacted(uri)} answers"


def _data(config: DataConfig) -> str:
    return f"{config.name} {check_dataset(config)}"


def _decodable(config: DataConfig) -> str:
    if bad := undecodable_images(config):
        return f"{len(bad):,} cannot be decoded and are left out (data.skip_bad=true)"
    return "every header is intact and a sample can be decoded"


def _alike(answers: list[NodeReport]) -> str:
    here = versions()
    for answer in answers:
        for name, there in answer.versions.items():
            if there != here[name]:
                raise UserError(
                    f"node {answer.host} has {name} {there}, this one {here[name]}; install the same requirements.lock "
                    "on every node, or give all the same image"
                )
    return f"alike on {len(answers) + 1} nodes: " + ", ".join(f"{name} {here[name]}" for name in ("python", "torch"))


def versions() -> dict[str, str]:
    """Python and packages that every node must have alike."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


@contextmanager
def _marker(folder: Path) -> Iterator[Path]:
    """A file in the storage for others to see, gone afterwards with all folders made for it.

    Raises:
        UserError: the folder cannot be written.
    """
    check_storage(folder)
    marker = folder / f".preflight-{uuid.uuid4().hex}"
    made = missing_parents(folder)
    try:
        put_text(marker, "")
    except Exception as error:  # whatever a client library raises: it is reported, not hidden
        raise storage_error(folder, error) from None
    try:
        yield marker
    finally:
        with suppress(OSError):  # somebody else may have begun to use the folder
            marker.unlink(missing_ok=True)
            remove_empty(made)


def _folder(config: Config) -> Path:
    return to_path(config.run.storage_path).resolve()


def _other_nodes(config: Config, searching: bool) -> list[dict[str, Any]]:
    """Nodes besides this one that may run a worker; none without a cluster."""
    if not _on_cluster(config, searching):
        return []
    wanted = _wanted(config, searching)
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return [node for node in nodes if slots_of_node(node["Resources"], wanted)]


def _ask(nodes: list[dict[str, Any]], config: Config, uri: str) -> list[NodeReport]:
    """Raises:
    UserError: a node does not answer, or there is nothing to ask it about.
    """
    data, environment = with_absolute_paths(config)["data"], tracking_environment() | storage_environment()
    with _marker(_folder(config)) as marker:
        asked = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(report_node)
            asked.append((node["NodeManagerHostname"], task.remote(str(marker), uri, data, environment)))
        return [_answer(host, future) for host, future in asked]


def _answer(host: str, future: Any) -> NodeReport:
    try:
        return ray.get(future, timeout=NODE_TIMEOUT_S)  # type: ignore[no-any-return]
    except ray.exceptions.RayError as error:
        raise UserError(
            f"node {host} cannot run a worker ({root_cause(error)}); install the same requirements.lock on every "
            "node, or submit with --packages"
        ) from None


def report_node(marker: str, uri: str, data: dict[str, Any], environment: dict[str, str]) -> NodeReport:
    """What the node this runs on says of itself; `environment` is what clients of MLflow and the storage read."""
    os.environ.update(environment)
    log = partial(check_reachable, uri) if uri and not is_local_store(uri) else lambda: None
    return NodeReport(
        socket.gethostname(),
        versions(),
        _complaint(partial(_seen, to_path(marker))),
        _complaint(log),
        _complaint(partial(check_dataset, DataConfig.model_validate(data))),
    )


def _seen(marker: Path) -> None:
    check_storage(marker.parent)
    if not marker.exists():
        raise UserError(
            f"run.storage_path = '{marker.parent}' is not the folder the driver sees; give a path that all nodes share"
        )


def _complaint(look_at: Callable[[], object]) -> str:
    try:
        look_at()
    except UserError as error:
        return str(error)
    return ""
