"""Work for a server that may go away: done in order by one thread, and tried again until it succeeds."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable

RETRY_S = 2.0  # between two tries to reach a server that went away


def first_cause(error: BaseException) -> str:
    """The first cause in one short line: "Connection refused" rather than what four layers made of it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:200]


class Deliveries:
    """Operations in the order they were put. Each must do no harm when it is tried again after half of it was done."""

    def __init__(self, complaint: str) -> None:
        """`complaint` is the warning when one fails, with the cause in place of {}."""
        self._complaint = complaint
        self._queue: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._closing = self._abandoned = False
        self._thread = threading.Thread(target=self._deliver, name="deliveries", daemon=True)
        self._thread.start()

    def put(self, operation: Callable[[], object]) -> None:
        """Queue one operation; returns at once."""
        with self._wake:
            self._queue.append(operation)
            self._wake.notify()

    def close(self, timeout_s: float) -> int:
        """Wait until all is done, or nothing was for `timeout_s`; returns how many operations are left."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        left = None
        while self._thread.is_alive() and left != len(self._queue):
            left = len(self._queue)
            self._thread.join(timeout_s)
        with self._wake:
            self._abandoned = True  # whoever delivers the rest must be the only one
            return len(self._queue)

    def _deliver(self) -> None:
        warned = False
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if not self._queue or self._abandoned:
                    return
                operation = self._queue[0]
            try:
                operation()
            except Exception as error:  # any failure of server, network or client: keep the work and try again
                if not warned:
                    warned = True
                    warnings.warn(self._complaint.format(first_cause(error)), stacklevel=1)
                time.sleep(RETRY_S)
                continue
            warned = False
            with self._wake:
                self._queue.popleft()
