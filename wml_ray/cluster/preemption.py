"""Notices that a node is about to be preempted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import ray
from ray._private.state import state

from wml_ray.distributed import broadcast_from_rank_0

CHECKPOINT_INTERVAL_S = 10.0  # between two checkpoints in the middle of an epoch, while a node is about to stop
POLL_S = 5.0  # between two queries for draining nodes, the interval of Ray Train


class PreemptionNotice:
    """Decides, alike on all workers of a training, when a preemption notice calls for a checkpoint."""

    def __init__(self, notified: Callable[[], bool]) -> None:
        """`notified` is True once a node of this training is about to be preempted."""
        self._notified, self._last_s = notified, -math.inf

    def preempted(self) -> bool:
        """True if a node is about to be preempted and the last checkpoint for that is ten seconds old."""
        if not self._notified():
            return False
        if not broadcast_from_rank_0(lambda: time.monotonic() - self._last_s > CHECKPOINT_INTERVAL_S):
            return False
        self._last_s = time.monotonic()
        return True


@contextmanager
def watch_node() -> Iterator[Callable[[], bool]]:
    """A function that is True once this process's node is about to be preempted.

    Ray Train has the same for its own workers only; a trial on one worker is none. A thread queries the head, which
    may take long to answer or fail.
    """
    notified, ended = threading.Event(), threading.Event()
    node_id = ray.get_runtime_context().get_node_id()

    def watch() -> None:
        while not ended.wait(POLL_S):
            with suppress(ray.exceptions.RayError):  # an unreachable head fails the trial elsewhere
                if node_id in state.get_draining_nodes():
                    notified.set()

    threading.Thread(target=watch, name="preemption-notice", daemon=True).start()
    try:
        yield notified.is_set
    finally:
        ended.set()
