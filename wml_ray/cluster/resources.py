"""What a cluster holds of a run's workers or a study's trials, and what its autoscaler could add."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks it
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from wml_ray.config.schema import Config
from wml_ray.errors import UserError
from wml_ray.search.settings import SearchConfig

AUTOSCALER_TIMEOUT_S = 30.0  # how long an autoscaler may take to answer a demand


def check_capacity(workers: int, wanted: Mapping[str, float]) -> str:
    """How the cluster holds so many workers, in words: now, or when its autoscaler has made room for them.

    Raises:
        UserError: it never will.
    """
    now = worker_slots(wanted)
    what = f"{workers} worker{'s' * (workers > 1)} with {_in_words(wanted)} each"
    there = f"cluster has {now} such place{'s' * (now != 1)}"
    if now >= workers:
        return f"{what}: the {there}"
    if _grows(workers, wanted):
        return f"{what}: the {there}, its autoscaler adds the rest"
    raise UserError(
        f"{what} do{'es' * (workers == 1)} not fit: this {there}, and no autoscaler that adds the rest; use fewer "
        f"scale.workers or a smaller scale.cpus_per_worker{', or scale.gpu=false' * ('GPU' in wanted)}"
    )


def max_concurrent_trials(config: Config, settings: SearchConfig) -> int:
    """How many trials are to run now: what fits the nodes there are, and one more, which an autoscaler makes room for.

    Trials of several workers take all their places at once or wait, so none holds what another waits for.
    """
    room = worker_slots(trial_resources(config)) // max(worker_range(config)[1], 1)
    return min(room + 1 if _joined() else max(room, 1), settings.concurrent or sys.maxsize)


def trial_resources(config: Config) -> dict[str, float]:
    """What each worker of a trial takes: one core unless the config says more, so that many trials run at a time."""
    return {"CPU": float(config.scale.cpus_per_worker or 1), **({"GPU": 1.0} if config.scale.gpu else {})}


def has_several_workers(config: Config) -> bool:
    """Whether a trial starts Ray Train, or trains in its own actor."""
    return worker_range(config)[1] > 1


def _joined() -> bool:
    """Whether the cluster was there before: one of our own on this machine does not grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _grows(workers: int, wanted: Mapping[str, float]) -> bool:
    """Whether an autoscaler makes room: it is asked to, for what it may add it tells nobody."""
    if not _joined():
        return False
    asked = placement_group([dict(wanted)] * workers)
    try:
        deadline_s = time.monotonic() + AUTOSCALER_TIMEOUT_S
        heard_of = None  # the state of the cluster that was the first with this demand
        while time.monotonic() < deadline_s:
            if asked.wait(1):
                return True
            cluster, autoscaler = _cluster_state()
            if _among(asked, autoscaler.infeasible_gang_resource_requests):
                continue  # for ever, or until nodes that are going have gone
            if heard_of is None and _among(asked, cluster.pending_gang_resource_requests):
                heard_of = cluster.cluster_resource_state_version
            answered = heard_of is not None and autoscaler.last_seen_cluster_resource_state_version >= heard_of
            if answered and (autoscaler.pending_instance_requests or autoscaler.pending_instances):
                return True
        return False
    finally:
        remove_placement_group(asked)


def _cluster_state() -> tuple[Any, Any]:
    """What the cluster asks for, and what its autoscaler makes of it."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(
        GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=AUTOSCALER_TIMEOUT_S)
    )
    return reply.cluster_resource_state, reply.autoscaling_state


def _among(group: PlacementGroup, requests: Iterable[Any]) -> bool:
    return any(group.id.hex() in request.details for request in requests)


def _in_words(resources: Mapping[str, float]) -> str:
    cores = resources["CPU"]
    return f"{cores:.0f} CPU core{'s' * (cores != 1)}{' and a GPU' if 'GPU' in resources else ''}"


def worker_range(config: Config) -> tuple[int, int]:
    workers = config.scale.workers
    return (workers[0], workers[1]) if isinstance(workers, list) else (workers, workers)


def worker_resources(config: Config) -> dict[str, float]:
    """What each worker of a run takes of a node."""
    return {"CPU": float(cpus_per_worker(config)), **({"GPU": 1.0} if config.scale.gpu else {})}


def cpus_per_worker(config: Config) -> int:
    if config.scale.cpus_per_worker is not None:
        return config.scale.cpus_per_worker
    nodes = _cpus_of_nodes()
    return max(1, min(sum(nodes) // worker_range(config)[1], max(nodes)))


def worker_slots(wanted: Mapping[str, float]) -> int:
    """Workers that fit the nodes there are, if each takes these resources of one node."""
    return sum(slots_of_node(node, wanted) for node in _resources_of_nodes())


def slots_of_node(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """Workers that fit one node of these resources."""
    return min(int(dict(node).get(name, 0) // amount) for name, amount in wanted.items())


def _resources_of_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _cpus_of_nodes() -> list[int]:
    return [int(resources.get("CPU", 0)) for resources in _resources_of_nodes()]
