"""Work for a server that may go away: done in order by one thread, and tried again until it succeeds."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from wml_ray.errors import UserError, root_cause
from wml_ray.storage.paths import is_remote

RETRY_S = 2.0  # between two tries to reach a server that went away


class RetryQueue:
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
                    warnings.warn(self._complaint.format(root_cause(error)), stacklevel=1)
                time.sleep(RETRY_S)
                continue
            warned = False
            with self._wake:
                self._queue.popleft()


STORAGE_TIMEOUT_S = 600.0  # how long a run waits for a storage that went away
PERMANENT_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # of a file system
T = TypeVar("T")


class StorageUnavailable(UserError):
    """The storage went away and did not come back."""


def retry_for(call: Callable[[], T], path: Path) -> T:
    """A call that the storage may refuse for a while.

    Raises:
        OSError: as `call` does, if waiting does not help.
        StorageUnavailable: the storage refused it for ten minutes.
    """
    failures = Exception if is_remote(path) else OSError  # whatever a client library raises
    lasting = (UserError, FileNotFoundError) if is_remote(path) else (UserError, *PERMANENT_ERRORS)
    deadline_s = time.monotonic() + STORAGE_TIMEOUT_S
    warned = False
    while True:
        try:
            return call()
        except lasting:
            raise
        except failures as error:
            if time.monotonic() > deadline_s:
                raise storage_unavailable(path, root_cause(error)) from None
            if not warned:
                warned = True
                warnings.warn(f"{path}: the storage fails ({root_cause(error)}); trying again", stacklevel=2)
            time.sleep(RETRY_S)


def storage_unavailable(path: Path, cause: str) -> StorageUnavailable:
    """What to say of it, in one sentence."""
    return StorageUnavailable(
        f"{path}: the storage fails ({cause}); run the same command again when it works: it goes on from the newest "
        "checkpoint there"
    )
