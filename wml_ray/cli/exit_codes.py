"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wml_ray.errors import Diverged, UserError
from wml_ray.storage.lease import LeaseLost
from wml_ray.storage.retry import StorageUnavailable

OK, FAILED, USER_ERROR = 0, 1, 2
TERMINATED = 128 + signal.SIGTERM


def exit_code(action: Callable[[], int]) -> int:
    """Run `action` and return its exit code.

    2 after a UserError; 143 after SIGTERM; 1 after divergence, a storage that fails for too long, a lost lease or
    Ctrl-C.
    """
    sigterm = threading.Event()
    try:
        with _interrupting(sigterm):
            return action()
    except UserError as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return FAILED if isinstance(error, (LeaseLost, StorageUnavailable)) else USER_ERROR
    except Diverged as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interrupt:
        print(f"wml-ray: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return TERMINATED if sigterm.is_set() else FAILED
    except BrokenPipeError:
        if not _discard_output():
            raise
        return FAILED


@contextmanager
def _interrupting(sigterm: threading.Event) -> Iterator[None]:
    """Set the event and raise KeyboardInterrupt on SIGTERM, as Kubernetes, systemd and `ray job stop` send it.

    A second SIGTERM does not interrupt the clean-up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sigterm.set()  # while Ray waits for a result, it turns a subclass of KeyboardInterrupt into the class itself
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, before)


def _discard_output() -> bool:
    """True if stdout is a pipe without a reader (`| head`); it then leads to the null device."""
    import select

    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
