"""Calls from Ray's workers to the process that started them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

DRAIN_TIMEOUT_S = 60.0  # a trial's history is taken by Ray Tune epoch by epoch


class DriverQueue:
    """Carries calls from the workers to this process, which has no other way to hear of them."""

    def __init__(self, receivers: Mapping[str, Callable[..., None]], pause_s: float = 0) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor = ray.remote(num_cpus=0, scheduling_strategy=here)(
            _QueueActor
        ).remote()  # no other node's loss ends it
        self._receivers, self._pause_s = receivers, pause_s
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def __enter__(self) -> DriverQueue:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._closing.set()
        ray.get(self.actor.close.remote())
        self._thread.join(DRAIN_TIMEOUT_S)
        ray.kill(self.actor)
        if self._error and not error:
            raise self._error

    def sender(self, receiver: str, answered: bool = True) -> Callable[..., Any]:
        """A stand-in for `receivers[receiver]` on any node, whose calls arrive in order.

        It returns a reference to whether the call was taken; if `answered`, the next call waits for that.
        """
        return _Sender(self.actor, receiver, answered)

    def _receive(self) -> None:
        """Until the workers have sent all, or a receiver wants no more."""
        try:
            while letters := ray.get(self.actor.take.remote()):
                for receiver, arguments in letters:
                    self._receivers[receiver](*arguments)
                    self.actor.acknowledge.remote()
                self._closing.wait(self._pause_s)
        except BaseException as error:  # raised again where the mailbox closes
            self._error = error
            self.actor.close.remote()


class _Sender:
    def __init__(self, actor: Any, receiver: str, answered: bool) -> None:
        self._actor, self._receiver, self._answered = actor, receiver, answered
        self._before: Any = None

    def __call__(self, *arguments: Any) -> Any:
        # the call before is an argument of this one, for Ray keeps no order among the coroutines of an actor
        self._before = self._actor.deliver.remote(self._receiver, arguments, self._answered, self._before)
        return self._before


class _QueueActor:
    """An asyncio actor, in which a call may wait for another."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, tuple[Any, ...]]] = []
        self.sent = self.acknowledged = 0
        self.closed = False
        self.changed = asyncio.Condition()

    async def deliver(self, receiver: str, arguments: tuple[Any, ...], answered: bool, _before: bool | None) -> bool:
        """Whether the letter was taken, once it is known; if nobody waits for that, whether it may be."""
        async with self.changed:
            self.letters.append((receiver, arguments))
            self.sent += 1
            number = self.sent
            self.changed.notify_all()
            if not answered:
                return not self.closed
            await self.changed.wait_for(lambda: self.acknowledged >= number or self.closed)
            return self.acknowledged >= number

    async def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        """All letters there are, as soon as there are any; none when no more will come."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.letters or self.closed)
            taken, self.letters = self.letters, []
            return taken

    async def acknowledge(self) -> None:
        """The oldest letter that was not yet."""
        async with self.changed:
            self.acknowledged += 1
            self.changed.notify_all()

    async def close(self) -> None:
        """Nothing will be taken that is not in the box now."""
        async with self.changed:
            self.closed = True
            self.changed.notify_all()
