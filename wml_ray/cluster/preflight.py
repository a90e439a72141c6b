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

from wml_ray import ray_room, ray_train, readers, storage, tracking
from wml_ray.config import Config, DataConfig, UserError, place
from wml_ray.delivery import first_cause

ANSWER_S = 120.0  # how long a node may take to start a process that imports torch, and to look
PACKAGES = ("ray", "torch", "torchvision", "torch-pruning", "safetensors", "mlflow")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, or what is wrong and how to mend it."""

    subject: str
    fine: bool
    text: str


@dataclass(frozen=True)
class Answer:
    """What one node says of itself; each of the last three is empty or says what is wrong."""

    host: str
    versions: dict[str, str]
    storage: str
    tracking: str
    data: str


def check(config: Config, searching: bool = False) -> None:
    """Join the cluster, if there is to be one, and see that it has what the run, or the trials of a study, need.

    Raises:
        UserError: it has not.
    """
    for finding in _room(config, searching):
        _insist(finding)
    if others := _other_nodes(config, searching):
        for finding in _places(config, searching, others):
            _insist(finding)


def look(config: Config, searching: bool = False) -> Iterator[Finding]:
    """Everything `check` insists on, and what else would stop the run; good and bad, and nothing is left behind."""
    yield from _room(config, searching)
    if not _on_cluster(config, searching) or ray.is_initialized():
        yield from _places(config, searching, _other_nodes(config, searching))


def _room(config: Config, searching: bool) -> Iterator[Finding]:
    if not _on_cluster(config, searching):
        yield _found("resources", partial(_this_process, config))
        return
    joined = _found("cluster", _cluster)
    yield joined
    if joined.fine:
        workers = max(ray_train.worker_range(config)[0], 1)
        yield _found("resources", partial(ray_room.check_room, workers, _wanted(config, searching)))


def _places(config: Config, searching: bool, others: list[dict[str, Any]]) -> Iterator[Finding]:
    """What must be at hand wherever a worker may run: on this node, then on all others."""
    uri = tracking.tracking_uri()
    try:
        answers = _ask(others, config, "" if searching else uri) if others else []
    except UserError as error:
        yield Finding("nodes", False, str(error))
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
            finding = Finding(subject, False, wrong[0])
        shared = everywhere if finding.fine and not (subject == "MLflow" and searching) else ""
        yield Finding(subject, finding.fine, finding.text + shared)


def _on_cluster(config: Config, searching: bool) -> bool:
    return searching or config.scale.workers != 0


def _wanted(config: Config, searching: bool) -> dict[str, float]:
    """What each worker takes of a node."""
    return ray_room.trial_resources(config) if searching else ray_train.worker_resources(config)


def _found(subject: str, look_at: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, look_at())
    except UserError as error:
        return Finding(subject, False, str(error))


def _insist(finding: Finding) -> None:
    if not finding.fine:
        raise UserError(finding.text)


def _this_process(config: Config) -> str:
    if config.scale.gpu and not torch.cuda.is_available():
        raise UserError("scale.gpu = true but this machine has no CUDA GPU; set scale.gpu=false")
    return "this process" + (f" and {torch.cuda.get_device_name()}" if config.scale.gpu else "")


def _cluster() -> str:
    ray_train.join_cluster()
    total, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
    count = f"{len(nodes)} node{'s' * (len(nodes) > 1)}"
    return f"{count}, {total.get('CPU', 0):.0f} CPU cores, {total.get('GPU', 0):.0f} GPUs"


def _writable(config: Config) -> str:
    folder = _folder(config)
    with _marker(folder):
        return f"{folder} can be written"


def _reachable(uri: str, from_elsewhere: bool) -> str:
    tracking.check_reachable(uri)
    if from_elsewhere and tracking.is_local(uri):
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{tracking.shown(uri)}' is a file of this machine, but workers on others log "
            "to it; start an MLflow server and set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    return f"{tracking.shown(uri)} answers"


def _data(config: DataConfig) -> str:
    return f"{config.name} {readers.check(config)}"


def _alike(answers: list[Answer]) -> str:
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
    storage.check(folder)
    marker = folder / f".preflight-{uuid.uuid4().hex}"
    made = storage.missing(folder)
    try:
        storage.put_text(marker, "")
    except Exception as error:  # whatever a client library raises: it is reported, not hidden
        raise storage.unusable(folder, error) from None
    try:
        yield marker
    finally:
        with suppress(OSError):  # somebody else may have begun to use the folder
            marker.unlink(missing_ok=True)
            storage.remove_empty(made)


def _folder(config: Config) -> Path:
    return place(config.run.storage_path).resolve()


def _other_nodes(config: Config, searching: bool) -> list[dict[str, Any]]:
    """Nodes besides this one that may run a worker; none without a cluster."""
    if not _on_cluster(config, searching):
        return []
    wanted = _wanted(config, searching)
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return [node for node in nodes if ray_train.places_of(node["Resources"], wanted)]


def _ask(nodes: list[dict[str, Any]], config: Config, uri: str) -> list[Answer]:
    """Raises:
    UserError: a node does not answer, or there is nothing to ask it about.
    """
    data, environment = ray_train.with_absolute_paths(config)["data"], tracking.environment() | storage.environment()
    with _marker(_folder(config)) as marker:
        asked = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(answer)
            asked.append((node["NodeManagerHostname"], task.remote(str(marker), uri, data, environment)))
        return [_answer(host, future) for host, future in asked]


def _answer(host: str, future: Any) -> Answer:
    try:
        return ray.get(future, timeout=ANSWER_S)  # type: ignore[no-any-return]
    except ray.exceptions.RayError as error:
        raise UserError(
            f"node {host} cannot run a worker ({first_cause(error)}); install the same requirements.lock on every "
            "node, or submit with --packages"
        ) from None


def answer(marker: str, uri: str, data: dict[str, Any], environment: dict[str, str]) -> Answer:
    """What the node this runs on says of itself; `environment` is what clients of MLflow and the storage read."""
    os.environ.update(environment)
    log = partial(tracking.check_reachable, uri) if uri and not tracking.is_local(uri) else lambda: None
    return Answer(
        socket.gethostname(),
        versions(),
        _complaint(partial(_seen, place(marker))),
        _complaint(log),
        _complaint(partial(readers.check, DataConfig.model_validate(data))),
    )


def _seen(marker: Path) -> None:
    storage.check(marker.parent)
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
