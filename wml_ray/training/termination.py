"""SIGTERM during a training in this process, as Kubernetes and systemd send it."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType

GRACE_S = 3.0  # for the steps before a checkpoint and for writing it; all must have ended after 10 s


class Termination:
    """While it is entered, a first SIGTERM only sets `requested`. `end` passes it on to the handler from before, as
    does the end of `GRACE_S`; a second SIGTERM reaches that handler at once.

    Nothing is changed in a thread, which receives no signals, nor where SIGTERM has no handler in Python.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before = signal.getsignal(signal.SIGTERM)
        self._timer = threading.Timer(GRACE_S, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True

    def __enter__(self) -> Termination:
        if callable(self._before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        if signal.getsignal(signal.SIGTERM) == self._request:
            signal.signal(signal.SIGTERM, self._before)
        if kind is None:
            self.end()

    def end(self) -> None:
        """Call the handler from before if SIGTERM was received, which usually raises KeyboardInterrupt."""
        if self.requested:
            self._timer.cancel()
            self.requested = False
            signal.raise_signal(signal.SIGTERM)

    def _request(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        self.requested = True
        self._timer.start()
