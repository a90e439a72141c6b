"""Messages from Ray's workers to the driver, the process that started them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ray
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

DRAIN_TIMEOUT_S = 60.0  # for the messages that are left when the queue closes: Ray Tune takes a report at a time


class DriverQueue:
    """Calls `receivers` in a thread of this process, with the workers' messages in the order they were sent."""

    def __init__(self, receivers: Mapping[str, Callable[..., None]]) -> None:
        self._receivers, self._messages = receivers, _queue_on_this_node()
        self._replies: dict[str, Queue] = {}  # by receiver
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name="driver-queue", daemon=True)
        self._thread.start()

    def __enter__(self) -> DriverQueue:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Process the messages that are left, then raise the error of a receiver if no other error is under way."""
        self._messages.put(None)
        self._thread.join(DRAIN_TIMEOUT_S)
        for queue in (self._messages, *self._replies.values()):
            queue.shutdown(force=True)
        if self._error and not error:
            raise self._error

    def sender(self, receiver: str, acknowledge: bool = True) -> Sender:
        """A function that sends its arguments to `receivers[receiver]`, for use on any node."""
        if not acknowledge:
            return Sender(receiver, self._messages, None)
        self._replies[receiver] = _queue_on_this_node()
        return Sender(receiver, self._messages, self._replies[receiver])

    def _drain(self) -> None:
        """Process messages until the queue closes. After an error of a receiver the others are discarded."""
        try:
            while (message := self._messages.get()) is not None:
                receiver, arguments, token = message
                try:
                    if not self._error:
                        self._receivers[receiver](*arguments)
                except BaseException as error:  # SystemExit too, with which Ray Tune stops a trial
                    self._error = error
                if token:
                    self._replies[receiver].put((token, not self._error))
        except ray.exceptions.RayError as error:  # raised where the queue closes
            self._error = self._error or error


@dataclass(frozen=True)
class Sender:
    """Sends messages to one receiver of a `DriverQueue`."""

    receiver: str
    messages: Queue
    replies: Queue | None

    def __call__(self, *arguments: object) -> bool:
        """Return once the message is queued; with `acknowledge`, once the driver has processed it.

        False if a receiver has raised, so that this message was discarded. Without `acknowledge` always True.
        """
        token = None if self.replies is None else uuid.uuid4().hex
        self.messages.put((self.receiver, arguments, token))
        if self.replies is None:
            return True
        while (reply := self.replies.get())[0] != token:
            pass  # it was for a worker that died while it waited
        return bool(reply[1])


def _queue_on_this_node() -> Queue:
    """A queue that does not end with another node."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": this_node})
