"""Connections to a job server: addresses and tokens."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import ray

from wml_ray.errors import UserError
from wml_ray.submit import client
from wml_ray.submit.client import connect

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"


class JobServer(BaseHTTPRequestHandler):
    """Responds to Ray's first requests as a dashboard with token authentication does."""

    def do_GET(self):
        given = self.headers.get("Authorization")
        self.send_response(401 if given is None else 200 if given == f"Bearer {TOKEN}" else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": ray.__version__}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), JobServer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")  # `connect` sets it; the option comes before it
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_the_token_of_this_machine_is_used_without_ray_auth_mode(url, tmp_path):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert connect(url).get_address() == url


@pytest.mark.parametrize(
    ("token", "problem"),
    [("wrong", "does not accept the token of RAY_AUTH_TOKEN"), ("", "requires a token, and this machine has none")],
)
def test_a_wrong_or_missing_token_is_one_line_that_names_the_address_first(url, monkeypatch, token, problem):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(UserError) as raised:
        connect(url)
    line = str(raised.value)
    assert line.index(url) < line.index(problem) < line.index("ray get-auth-token")


@pytest.mark.parametrize(
    ("token", "problem"),
    [("wrong", "does not accept the token of RAY_AUTH_TOKEN"), ("", "requires a token, and this machine has none")],
)
def test_the_line_is_the_same_with_ray_auth_mode(url, token, problem):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    command = [sys.executable, "-m", "wml_ray", "jobs", "status", "--address", url]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"wml-ray: the Ray cluster at {url} {problem}; ")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:8265", "http://127.0.0.1:none"])
def test_an_address_without_a_cluster_is_one_line(address):
    with pytest.raises(UserError, match=r"--address http://HOST:8265") as raised:
        connect(address)
    assert address in str(raised.value)


def test_an_address_with_the_scheme_of_a_ray_module_is_passed_on_to_ray():
    with pytest.raises(UserError, match=r"anyscale://cluster refused: "):
        connect("anyscale://cluster")


def test_the_dashboard_is_on_the_host_of_ray_address_at_the_port_that_the_cluster_gives(url, monkeypatch):
    port = url.rpartition(":")[2]

    class Cluster:
        def __init__(self, address):
            pass

        def internal_kv_get(self, *_, **__):
            return f"10.255.255.1:{port}".encode()

    monkeypatch.setattr(client, "GcsClient", Cluster)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", f"localhost:{port}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert connect(None).get_address() == f"http://localhost:{port}"


def test_an_unreachable_cluster_of_ray_address_is_named(monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.2:9")
    with pytest.raises(UserError, match=r"no Ray cluster at RAY_ADDRESS = 127\.0\.0\.2:9"):
        connect(None)
