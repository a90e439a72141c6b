"""What a signal makes of a command: the exit code and one line."""

import signal
import subprocess
import sys

import pytest

COMMAND = """
import sys
from wml_ray.cli.exit_codes import exit_code

def wait():
    print("waits", flush=True)
    try:
        sys.stdin.read()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted") from None  # as Ray does: it keeps no subclass

sys.exit(exit_code(wait))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_one_line_and_its_own_exit_code(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
    )
    assert process.stdout.readline() == "waits\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "wml-ray: interrupted\n")
