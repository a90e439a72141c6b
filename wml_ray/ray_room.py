"""What a cluster holds of a study's trials, and whether it grows."""

from __future__ import annotations

import os
import sys
import time

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group, remove_placement_group

from wml_ray import ray_train
from wml_ray.config import Config, UserError
from wml_ray.space import SearchConfig

GROWTH_S = 30.0  # how long an autoscaler may take to answer a demand


def check_room(config: Config) -> None:
    """See that the cluster holds a trial, or has an autoscaler that makes room for one when it is asked.

    Raises:
        UserError: neither.
    """
    fewest, wanted = max(ray_train.worker_range(config)[0], 1), worker_resources(config)
    if ray_train.places(wanted) >= fewest:
        return
    asked = placement_group([wanted] * fewest)
    try:
        deadline_s = time.monotonic() + (GROWTH_S if _joined() else 0)
        while not asked.wait(1):
            if _grows():
                return
            if time.monotonic() > deadline_s:
                raise UserError(
                    f"a trial of {fewest} workers with {_in_words(wanted)} each does not fit: this cluster has "
                    f"{ray_train.places(wanted)} such places and does not grow; use fewer scale.workers or a smaller "
                    "scale.cpus_per_worker"
                )
    finally:
        remove_placement_group(asked)


def trials_at_a_time(config: Config, settings: SearchConfig) -> int:
    """How many trials are to run now: what fits the nodes there are, and one more, which an autoscaler makes room for.

    Trials of several workers take all their places at once or wait, so none holds what another waits for.
    """
    room = ray_train.places(worker_resources(config)) // max(ray_train.worker_range(config)[1], 1)
    return min(room + 1 if _joined() else max(room, 1), settings.concurrent or sys.maxsize)


def _joined() -> bool:
    """Whether the cluster was there before: one of our own on this machine does not grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _grows() -> bool:
    """Whether an autoscaler is starting nodes."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return bool(status.pending_launches or status.pending_nodes)


def worker_resources(config: Config) -> dict[str, float]:
    return {"CPU": float(config.scale.cpus_per_worker or 1), **({"GPU": 1.0} if config.scale.gpu else {})}


def _in_words(resources: dict[str, float]) -> str:
    return f"{resources['CPU']:.0f} CPU cores{' and a GPU' if 'GPU' in resources else ''}"


def several_workers(config: Config) -> bool:
    """Whether a trial starts Ray Train, or trains in its own actor."""
    return ray_train.worker_range(config)[1] > 1
