"""Notices that a node is about to be taken away."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import ray
import ray.tune
from ray._private.state import state

from wml_ray.distributed import WorkerRank, broadcast_from_rank_0

BETWEEN_CHECKPOINTS_S = 10.0  # while a node is about to be taken away


class PreemptionNotice:
    """What is heard of nodes that are about to be taken away: `announced` says whether one of this training's is."""

    def __init__(self, worker: WorkerRank, announced: Callable[[], bool]) -> None:
        self._shard, self._announced, self._last_s = worker, announced, -math.inf

    def preempted(self) -> bool:
        """Whether a node is to go, and it is time for another checkpoint; the same on all workers."""
        if not self._announced():
            return False
        if not broadcast_from_rank_0(self._shard, lambda: time.monotonic() - self._last_s > BETWEEN_CHECKPOINTS_S):
            return False
        self._last_s = time.monotonic()
        return True


POLL_S = 5.0  # between two looks whether a trial's machine is to go, as often as Ray Train looks


@contextmanager
def watch_node() -> Iterator[Callable[[], bool]]:
    """Whether this trial's machine is about to be taken away, which Ray Train tells none but its own workers.

    A thread asks, for the answer of a head that is away can take as long as it likes.
    """
    is_to_go, ended = threading.Event(), threading.Event()
    here = ray.get_runtime_context().get_node_id()

    def watch() -> None:
        while not ended.wait(POLL_S):
            with suppress(ray.exceptions.RayError):  # a head that is away; others say so
                if here in state.get_draining_nodes():
                    is_to_go.set()

    threading.Thread(target=watch, name="notices", daemon=True).start()
    try:
        yield is_to_go.is_set
    finally:
        ended.set()
