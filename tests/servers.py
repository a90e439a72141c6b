"""Real servers for the tests: MLflow, an S3 store, and a proxy with a password."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from deadline import DEADLINE_S

OUTAGE_S = float(os.environ.get("WML_TEST_OUTAGE_S", "8"))  # of a server in the tests that wait for its return


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LEAN = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else a dozen processes


class Server:
    """A real MLflow server with its own sqlite file, or with the database `store`."""

    health = "health"

    def __init__(self, folder, store=None):
        self.folder, self.port, self.process = folder, free_port(), None
        self.store = store or f"sqlite:///{folder}/server.db"
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                self.command(),
                env={**os.environ, **LEAN},
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )

    def command(self):
        folder = self.folder
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        return [*command, "--artifacts-destination", str(folder / "artifacts")]

    def wait(self, timeout_s=DEADLINE_S):
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                urllib.request.urlopen(f"{self.uri}/{self.health}", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def signal(self, number):
        """Send a signal to all processes of the server."""
        os.killpg(self.process.pid, number)

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def guarded(server, user, password):
    """The address of a proxy to `server` that requires a user name and a password."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return proxied(server, lambda headers: None if headers.get("Authorization") == f"Basic {token}" else 401)


@contextmanager
def proxied(server, refusal):
    """The address of a proxy to `server`. A request of whose headers `refusal` returns a status gets it as response."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            if status := refusal(self.headers):
                self.send_error(status)
                return
            types = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            request = urllib.request.Request(server.uri + self.path, body, types, method=self.command)
            try:
                response = urllib.request.urlopen(request)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                self.send_response(response.status)
                self.end_headers()
                self.wfile.write(response.read())

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()


class ObjectStore(Server):
    """A real S3 server with the bucket `runs`; objects are kept in memory."""

    health = "moto-api/"

    def command(self):
        return [sys.executable, str(Path(__file__).with_name("s3.py")), str(self.port), str(self.folder / "refuse")]

    def wait(self, timeout_s=DEADLINE_S):
        super().wait(timeout_s)
        urllib.request.urlopen(urllib.request.Request(f"{self.uri}/runs", method="PUT"), timeout=5).close()

    @property
    def environment(self):
        return {
            "AWS_ENDPOINT_URL": self.uri,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def refuse_writes(self):
        (self.folder / "refuse").touch()

    def accept_writes(self):
        (self.folder / "refuse").unlink(missing_ok=True)

    def pause(self):
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self):
        os.killpg(self.process.pid, signal.SIGCONT)


def installed(program: str | None, package: str) -> Path:
    """The path of a program. A test is skipped without it, and fails in CI, where a skip would stay unnoticed."""
    if program is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"not on this machine: apt-get install {package}")
    return Path(program)
