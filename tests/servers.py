"""What the tests that start real programs share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real MLflow server over its own sqlite file, or the database it is given."""

    def __init__(self, folder, store=None):
        self.folder, self.port, self.process = folder, free_port(), None
        self.store = store or f"sqlite:///{folder}/server.db"
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        folder = self.folder
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        lean = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen processes
        environment = {**os.environ, **lean}
        with (folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )

    def wait(self, timeout_s=90):
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def signal(self, number):
        """To all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def installed(program: str | None, package: str) -> Path:
    """The program that was looked for. A test without it is skipped, but fails in CI, where nobody would see."""
    if program is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"not on this machine: apt-get install {package}")
    return Path(program)
