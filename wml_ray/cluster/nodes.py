"""Checks of a cluster and its nodes: slots for the workers; versions, storage, MLflow and data on each node."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wml_ray.cluster.connect import join_cluster, with_absolute_paths
from wml_ray.cluster.preflight import run_check
from wml_ray.cluster.resources import check_capacity, slots_of_node, trial_resources, worker_resources
from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.data.readers import check_dataset
from wml_ray.errors import UserError, number_of, root_cause
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.storage.files import check_storage, storage_environment
from wml_ray.storage.paths import to_path
from wml_ray.storage.runs import RESULT, find_run
from wml_ray.tracking.client import check_reachable, is_local_store, tracking_environment

REPORT_TIMEOUT_S = 120.0  # for a node's report: it starts a process that imports torch
PACKAGES = ("ray", "torch", "torchvision", "torch-pruning", "safetensors", "mlflow")


@dataclass(frozen=True)
class NodeReport:
    """The checks of one node: its versions, and the errors by subject (storage, MLflow, data, teacher)."""

    host: str
    versions: dict[str, str]
    errors: dict[str, str]


def connect() -> str:
    """Connect to the cluster; returns its size in words.

    Raises:
        UserError: the cluster cannot be reached, or refuses the token.
    """
    join_cluster()
    total, nodes = ray.cluster_resources(), [node for node in ray.nodes() if node["Alive"]]
    return f"{number_of(len(nodes), 'node')}, {total.get('CPU', 0):.0f} CPU cores, {total.get('GPU', 0):.0f} GPUs"


def check_slots(config: Config, searching: bool) -> str:
    """A sentence on the slots for the fewest workers of the run, or of a trial.

    Raises:
        UserError: the cluster has too few slots, and no autoscaler adds them.
    """
    return check_capacity(max(config.scale.worker_range[0], 1), _resources_of_worker(config, searching))


def other_nodes(config: Config, searching: bool) -> list[dict[str, Any]]:
    """The nodes besides this one that may run a worker, as Ray describes them."""
    resources = _resources_of_worker(config, searching)
    this_node = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != this_node]
    return [node for node in nodes if slots_of_node(node["Resources"], resources)]


def reports_of(nodes: Sequence[dict[str, Any]], marker: Path, config: Config, uri: str) -> list[NodeReport]:
    """The report of each node, made by a task there; see `report_node`.

    Raises:
        UserError: a node cannot run the task.
    """
    settings, environment = with_absolute_paths(config), tracking_environment() | storage_environment()
    pending = []
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, scheduling_strategy=on_node, max_retries=0)(report_node)
        pending.append((node["NodeManagerHostname"], task.remote(str(marker), uri, settings, environment)))
    return [_wait_for_report(host, future) for host, future in pending]


def report_node(marker: str, uri: str, settings: dict[str, Any], environment: dict[str, str]) -> NodeReport:
    """Check on this node the file `marker`, MLflow at `uri`, and the data and the teacher of the config `settings`.

    `environment` holds the variables that clients of MLflow and the storage read.
    """
    os.environ.update(environment)
    config = parse_config(settings)
    checks: dict[str, Callable[[], object]] = {
        "storage": partial(_check_marker, to_path(marker)),
        "data": partial(check_dataset, config.data),
    }
    if uri and not is_local_store(uri):
        checks["MLflow"] = partial(check_reachable, uri)
    if config.teacher.run and config.method.name in TEACHER_METHODS:
        checks["teacher"] = partial(_check_run, config.teacher.run, config.run.storage_path)
    results = [run_check(subject, check) for subject, check in checks.items()]
    return NodeReport(socket.gethostname(), versions(), {r.subject: r.text for r in results if not r.passed})


def check_versions(reports: Sequence[NodeReport]) -> str:
    """A sentence with the versions that all nodes share.

    Raises:
        UserError: a node has another version of Python or of a package.
    """
    expected = versions()
    for report in reports:
        for name, found in report.versions.items():
            if found != expected[name]:
                raise UserError(
                    f"node {report.host} has {name} {found}, this one {expected[name]}; install the same "
                    "requirements.lock on every node, or give all the same image"
                )
    shared = ", ".join(f"{name} {expected[name]}" for name in ("python", "torch"))
    return f"alike on {len(reports) + 1} nodes: {shared}"


def versions() -> dict[str, str]:
    """Versions of Python and the packages that must be the same on every node."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _resources_of_worker(config: Config, searching: bool) -> dict[str, float]:
    return trial_resources(config) if searching else worker_resources(config)


def _wait_for_report(host: str, future: Any) -> NodeReport:
    try:
        return ray.get(future, timeout=REPORT_TIMEOUT_S)  # type: ignore[no-any-return]
    except ray.exceptions.RayError as error:
        raise UserError(
            f"node {host} cannot run a worker ({root_cause(error)}); install the same requirements.lock on every "
            "node, or submit with --packages"
        ) from None


def _check_run(run: str, storage_path: str) -> None:
    folder = find_run(run, storage_path)
    if folder is None or not (folder / RESULT).exists():
        raise UserError(f"teacher.run = '{run}' is not there; give a path that all nodes share")


def _check_marker(marker: Path) -> None:
    check_storage(marker.parent)
    if not marker.exists():
        raise UserError(
            f"run.storage_path = '{marker.parent}' is not the driver's folder; give a path that all nodes share"
        )
