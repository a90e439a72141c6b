"""Calls to servers and storage that may fail for a while: retried in place, or in order by a thread."""

from __future__ import annotations

import errno
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from wml_ray.errors import UserError, root_cause
from wml_ray.storage.paths import is_remote

RETRY_S = 2.0  # between two attempts
STORAGE_TIMEOUT_S = 600.0  # how long a run waits for a storage that fails
PERMANENT_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # of a file system
Errors = type[Exception] | tuple[type[Exception], ...]
T = TypeVar("T")


class StorageUnavailable(UserError):
    """A storage failed for longer than `STORAGE_TIMEOUT_S`."""


def retry_for(
    call: Callable[[], T],
    timeout_s: float,
    errors: Errors,
    failure: Callable[[Exception], Exception],
    *,
    permanent: Errors = (),
    warning: Callable[[Exception], str] | None = None,
) -> T:
    """Repeat `call` until it succeeds, for at most `timeout_s` after its first failure; returns its result.

    Errors of the types `errors` are retried, except those of the types `permanent`; all others are raised at once. The
    first failure is shown as the warning `warning(error)`. After the timeout `failure(error)` is raised.
    """
    deadline_s = None
    while True:
        try:
            return call()
        except permanent:
            raise
        except errors as error:
            if deadline_s is None:
                deadline_s = time.monotonic() + timeout_s
                if warning:
                    warnings.warn(warning(error), stacklevel=2)
            if time.monotonic() >= deadline_s:
                raise failure(error) from None
            time.sleep(RETRY_S)


def retry_storage(call: Callable[[], T], path: Path) -> T:
    """`retry_for` a call that reads or writes below `path`, with a warning at the first failure.

    Raises:
        OSError: of `call`, if a retry cannot help.
        StorageUnavailable: the storage failed for ten minutes.
    """
    remote = is_remote(path)
    return retry_for(
        call,
        STORAGE_TIMEOUT_S,
        Exception if remote else OSError,  # client libraries raise errors of their own
        lambda error: storage_unavailable(_problem(path, error)),
        permanent=(UserError, ImportError, FileNotFoundError) if remote else (UserError, *PERMANENT_ERRORS),
        warning=lambda error: f"{_problem(path, error)}; retrying",
    )


def storage_unavailable(problem: str) -> StorageUnavailable:
    """The error of a run whose storage failed for too long."""
    return StorageUnavailable(
        f"{problem}; run the same command again when it works: it resumes from the newest checkpoint"
    )


def _problem(path: Path, error: Exception) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on {path}"
    return f"{path}: the storage fails ({root_cause(error)})"


class RetryQueue:
    """Operations run by a thread in the order of `put`, each repeated until it succeeds.

    An operation must be harmless when it is repeated after a part of it was done.
    """

    def __init__(self, warning: str) -> None:
        """`warning` is shown when an operation first fails, with the cause in place of {}."""
        self._warning = warning
        self._queue: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._closing = self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="retry-queue", daemon=True)
        self._thread.start()

    def put(self, operation: Callable[[], object]) -> None:
        """Queue one operation; returns at once."""
        with self._wake:
            self._queue.append(operation)
            self._wake.notify()

    def close(self, timeout_s: float) -> int:
        """Wait until the queue is empty, or no operation succeeded for `timeout_s`; returns the operations left."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        left = None
        while self._thread.is_alive() and left != len(self._queue):
            left = len(self._queue)
            self._thread.join(timeout_s)
        with self._wake:
            self._abandoned = True  # only one process may run the remaining operations
            return len(self._queue)

    def _run(self) -> None:
        warned = False
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if not self._queue or self._abandoned:
                    return
                operation = self._queue[0]
            try:
                operation()
            except Exception as error:  # of the server, the network or a client library
                if not warned:
                    warned = True
                    warnings.warn(self._warning.format(root_cause(error)), stacklevel=1)
                time.sleep(RETRY_S)
                continue
            warned = False
            with self._wake:
                self._queue.popleft()
