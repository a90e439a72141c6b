"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from wml_ray.errors import Diverged, UserError
from wml_ray.storage.lease import LeaseLost
from wml_ray.storage.retry import StorageUnavailable

OK, FAILED, USER_ERROR = 0, 1, 2


def exit_code(action: Callable[[], int]) -> int:
    """Run `action` and return its exit code.

    2 after a UserError; 1 after divergence, a storage that fails for too long, a lost lease or an interruption.
    """
    try:
        return action()
    except UserError as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return FAILED if isinstance(error, (LeaseLost, StorageUnavailable)) else USER_ERROR
    except Diverged as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interrupt:
        print(f"wml-ray: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        if not _discard_output():
            raise
        return FAILED


def _discard_output() -> bool:
    """True if stdout is a pipe without a reader (`| head`); it then leads to the null device."""
    import select

    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
