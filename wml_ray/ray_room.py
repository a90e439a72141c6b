"""What a cluster holds of a run's workers or a study's trials, and what its autoscaler could add."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

import ray
from ray._private.state import state
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group, remove_placement_group

from wml_ray import ray_train
from wml_ray.config import Config, UserError
from wml_ray.space import SearchConfig

GROWTH_S = 30.0  # how long an autoscaler that does not say what it can add may take to answer a demand


def check_room(workers: int, wanted: Mapping[str, float]) -> str:
    """How the cluster holds so many workers, in words: now, or when its autoscaler has made room for them.

    Raises:
        UserError: it never will.
    """
    now, later = ray_train.places(wanted), _places_to_come(wanted)
    what = f"{workers} worker{'s' * (workers > 1)} with {_in_words(wanted)} each"
    if now >= workers:
        return f"{what}: the cluster has {now} such places"
    if now + later >= workers:
        return f"{what}: the cluster has {now} such places, its autoscaler can add {later}"
    if later == 0 and _grows_when_asked(workers, wanted):
        return f"{what}: the cluster has {now} such places and is starting nodes"
    growth = f"its autoscaler can add no more than {later}" if later else "does not grow"
    raise UserError(
        f"{what} do{'es' * (workers == 1)} not fit: this cluster has {now} such places and {growth}; use fewer "
        f"scale.workers or a smaller scale.cpus_per_worker{', or scale.gpu=false' if 'GPU' in wanted else ''}"
    )


def trials_at_a_time(config: Config, settings: SearchConfig) -> int:
    """How many trials are to run now: what fits the nodes there are, and one more, which an autoscaler makes room for.

    Trials of several workers take all their places at once or wait, so none holds what another waits for.
    """
    room = ray_train.places(trial_resources(config)) // max(ray_train.worker_range(config)[1], 1)
    return min(room + 1 if _joined() else max(room, 1), settings.concurrent or sys.maxsize)


def trial_resources(config: Config) -> dict[str, float]:
    """What each worker of a trial takes: one core unless the config says more, so that many trials run at a time."""
    return {"CPU": float(config.scale.cpus_per_worker or 1), **({"GPU": 1.0} if config.scale.gpu else {})}


def several_workers(config: Config) -> bool:
    """Whether a trial starts Ray Train, or trains in its own actor."""
    return ray_train.worker_range(config)[1] > 1


def _joined() -> bool:
    """Whether the cluster was there before: one of our own on this machine does not grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _places_to_come(wanted: Mapping[str, float]) -> int:
    """Workers that fit all nodes the autoscaler may run, by the node types it has told Ray of."""
    config = state.get_cluster_config()
    groups = config.node_group_configs if config else []
    return sum(ray_train.places_of(group.resources, wanted) * max(group.max_count, 0) for group in groups)


def _grows_when_asked(workers: int, wanted: Mapping[str, float]) -> bool:
    """Whether a demand makes nodes start: some autoscalers do not say what they can add."""
    if not _joined():
        return False
    asked = placement_group([dict(wanted)] * workers)
    try:
        deadline_s = time.monotonic() + GROWTH_S
        while time.monotonic() < deadline_s:
            status = get_cluster_status(ray.get_runtime_context().gcs_address)
            if asked.wait(1) or status.pending_launches or status.pending_nodes:
                return True
        return False
    finally:
        remove_placement_group(asked)


def _in_words(resources: Mapping[str, float]) -> str:
    cores = resources["CPU"]
    return f"{cores:.0f} CPU core{'s' * (cores != 1)}{' and a GPU' if 'GPU' in resources else ''}"
