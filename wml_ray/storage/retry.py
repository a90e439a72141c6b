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

from wml_ray.errors import UserError, root_cause, shortened
from wml_ray.storage.paths import is_remote

RETRY_S = 2.0  # between two attempts
STORAGE_TIMEOUT_S = 600.0  # how long a run waits for a storage that fails
NOT_FOUND = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
WRONG_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
Errors = type[Exception] | tuple[type[Exception], ...]
T = TypeVar("T")


class StorageUnavailable(UserError):
    """A storage failed for longer than `STORAGE_TIMEOUT_S`."""


def may_pass(error: BaseException) -> bool:
    """Whether a call that raised this error may succeed later, unlike one with a missing package or wrong credentials.

    The error may be one of a file system, or of the client of a storage or of MLflow.
    """
    if isinstance(error, (ImportError, PermissionError)) or getattr(error, "errno", None) in WRONG_PATH:
        return False
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):  # of botocore
        return False
    http_status = getattr(error, "get_http_status_code", None)  # of MLflow
    return http_status is None or http_status() not in (401, 403)


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

    Errors of the types `errors` are retried, except those of the types `permanent` and those that cannot pass; all
    others are raised at once. The first failure is shown as the warning `warning(error)`. After the timeout
    `failure(error)` is raised.
    """
    deadline_s = None
    while True:
        try:
            return call()
        except permanent:
            raise
        except errors as error:
            if not may_pass(error):
                raise
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
        FileNotFoundError, NotADirectoryError, IsADirectoryError, ImportError: of `call`.
        UserError: the path is too long, or a loop of links.
        StorageUnavailable: the storage failed for ten minutes, or refuses access.
    """
    try:
        return retry_for(
            call,
            STORAGE_TIMEOUT_S,
            Exception if is_remote(path) else OSError,  # client libraries raise errors of their own
            lambda error: storage_unavailable(_problem(path, error)),
            permanent=(UserError, ImportError, *NOT_FOUND),
            warning=lambda error: f"{_problem(path, error)}; retrying",
        )
    except (UserError, ImportError, *NOT_FOUND):
        raise
    except Exception as error:
        if getattr(error, "errno", None) in WRONG_PATH:
            raise UserError(f"{shortened(path)} cannot be used ({root_cause(error)}); name another folder") from None
        if may_pass(error):
            raise
        raise storage_unavailable(f"{path} cannot be used ({root_cause(error)})") from error


def storage_unavailable(problem: str) -> StorageUnavailable:
    """The error of a run whose storage failed for too long."""
    return StorageUnavailable(
        f"{problem}; run the same command again when it works: it resumes from the newest checkpoint"
    )


def _problem(path: Path, error: Exception) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on {path}"
    return f"{path}: the storage fails ({root_cause(error)})"


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, run in a thread; errors of `call` are raised, SystemExit included.

    Raises:
        TimeoutError: `call` has not returned. It continues in the background until the process ends.
    """
    results: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


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
        """Wait until the queue is empty; returns the operations left.

        The wait ends when no operation succeeded for `timeout_s`, or one failed with an error that cannot pass.
        """
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
                if self._closing and not may_pass(error):
                    return
                time.sleep(RETRY_S)
                continue
            warned = False
            with self._wake:
                self._queue.popleft()
