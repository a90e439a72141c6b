"""Slots for workers and trials: those of the nodes in a cluster, and those its autoscaler can add."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks it
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from wml_ray.config.schema import Config
from wml_ray.errors import UserError, number_of
from wml_ray.search.settings import SearchConfig

AUTOSCALER_TIMEOUT_S = 30.0  # for the autoscaler's response to a request


def check_capacity(workers: int, resources: Mapping[str, float]) -> str:
    """A sentence on the slots for `workers` workers of these resources each, now or after the cluster has grown.

    Raises:
        UserError: the cluster has too few slots, and no autoscaler adds them.
    """
    slots = worker_slots(resources)
    request = f"{number_of(workers, 'worker')} with {_in_words(resources)} each"
    available = f"cluster has {number_of(slots, 'such slot')}"
    if slots >= workers:
        return f"{request}: the {available}"
    if _autoscaler_adds(workers, resources):
        return f"{request}: the {available}, its autoscaler adds the rest"
    raise UserError(
        f"{request} do{'es' * (workers == 1)} not fit: this {available}, and no autoscaler that adds the rest; use "
        f"fewer scale.workers or a smaller scale.cpus_per_worker{', or scale.gpu=false' * ('GPU' in resources)}"
    )


def max_concurrent_trials(config: Config, settings: SearchConfig) -> int:
    """Trials to run at a time: those that fit the nodes, and one more on a joined cluster, so that an autoscaler grows.

    A trial of several workers takes all its slots at once, so trials never block each other.
    """
    fitting = worker_slots(trial_resources(config)) // max(config.scale.worker_range[1], 1)
    return min(fitting + 1 if _joined_existing() else max(fitting, 1), settings.concurrent or sys.maxsize)


def trial_resources(config: Config) -> dict[str, float]:
    """Resources of each worker of a trial: one core by default, so that many trials run at a time."""
    return {"CPU": float(config.scale.cpus_per_worker or 1), **({"GPU": 1.0} if config.scale.gpu else {})}


def worker_resources(config: Config) -> dict[str, float]:
    """Resources of each worker of a run."""
    return {"CPU": float(cpus_per_worker(config)), **({"GPU": 1.0} if config.scale.gpu else {})}


def cpus_per_worker(config: Config) -> int:
    """`scale.cpus_per_worker`, or an equal share of the cluster's cores that fits its largest node."""
    if config.scale.cpus_per_worker is not None:
        return config.scale.cpus_per_worker
    cores = [int(node.get("CPU", 0)) for node in _resources_of_nodes()]
    return max(1, min(sum(cores) // config.scale.worker_range[1], max(cores)))


def has_several_workers(config: Config) -> bool:
    """True if a trial starts Ray Train; a trial on one worker trains in its own actor."""
    return config.scale.worker_range[1] > 1


def worker_slots(resources: Mapping[str, float]) -> int:
    """Workers of these resources that fit the nodes of the cluster."""
    return sum(slots_of_node(node, resources) for node in _resources_of_nodes())


def slots_of_node(node: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """Workers of these resources that fit one node."""
    return min(int(node.get(name, 0) // amount) for name, amount in resources.items())


def _joined_existing() -> bool:
    """True on a cluster that was started by others. One of this process's own does not grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _autoscaler_adds(workers: int, resources: Mapping[str, float]) -> bool:
    """True if an autoscaler adds slots on request. Its limits cannot be queried, so a placement group requests them."""
    if not _joined_existing():
        return False
    group = placement_group([dict(resources)] * workers)
    try:
        deadline_s = time.monotonic() + AUTOSCALER_TIMEOUT_S
        version = None  # of the first cluster state with this request
        while time.monotonic() < deadline_s:
            if group.wait(1):
                return True
            cluster, autoscaler = _cluster_status()
            if _requested(group, autoscaler.infeasible_gang_resource_requests):
                continue  # perhaps only until draining nodes have stopped
            if version is None and _requested(group, cluster.pending_gang_resource_requests):
                version = cluster.cluster_resource_state_version
            processed = version is not None and autoscaler.last_seen_cluster_resource_state_version >= version
            if processed and (autoscaler.pending_instance_requests or autoscaler.pending_instances):
                return True
        return False
    finally:
        remove_placement_group(group)


def _cluster_status() -> tuple[Any, Any]:
    """The cluster's resource requests, and the state of its autoscaler."""
    reply = GetClusterStatusReply()
    client = GcsClient(ray.get_runtime_context().gcs_address)
    reply.ParseFromString(client.get_cluster_status(timeout_s=AUTOSCALER_TIMEOUT_S))
    return reply.cluster_resource_state, reply.autoscaling_state


def _requested(group: PlacementGroup, requests: Iterable[Any]) -> bool:
    return any(group.id.hex() in request.details for request in requests)


def _in_words(resources: Mapping[str, float]) -> str:
    return f"{number_of(round(resources['CPU']), 'CPU core')}{' and a GPU' if 'GPU' in resources else ''}"


def _resources_of_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
