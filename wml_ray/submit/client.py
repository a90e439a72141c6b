"""Connection to a cluster's job server."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import aiohttp
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks it
from ray.exceptions import AuthenticationError, RpcError
from ray.job_submission import JobSubmissionClient

from wml_ray.errors import UserError, one_line
from wml_ray.submit.token import ray_token

DEFAULT_URL = "http://127.0.0.1:8265"
URL_VARIABLE = "RAY_API_SERVER_ADDRESS"
CONNECT_TIMEOUT_S = 8.0


def connect(address: str | None) -> JobSubmissionClient:
    """A client of a cluster's job server.

    The server is at `address`, or at RAY_API_SERVER_ADDRESS, or it is that of the cluster at RAY_ADDRESS, or the
    default port of this host.

    Raises:
        UserError: no such address, no cluster there, or the cluster does not accept the token.
    """
    logging.disable(logging.WARNING)  # Ray's about addresses and tokens repeat the errors below
    url = address or os.environ.get(URL_VARIABLE) or _dashboard_url(os.environ.get("RAY_ADDRESS", ""))
    if "://" not in url:
        raise UserError(f"'{url}' is not the address of a Ray dashboard; give --address http://HOST:8265")
    os.environ[URL_VARIABLE] = url  # Ray's client prefers this variable to its argument
    if url.startswith(("http://", "https://")):
        _check_reachable(url, url)
    with cluster_errors(url):
        try:
            return JobSubmissionClient(url)
        except AuthenticationError:  # also raised where Ray was imported before `configure_ray`
            token, _ = ray_token()
            if not token:
                raise
            return JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"})


def _dashboard_url(cluster: str) -> str:
    """The dashboard's URL of the cluster at RAY_ADDRESS: its port is read from the cluster.

    The cluster's own address of the dashboard may be valid on the head node only.
    """
    if "://" in cluster:
        return cluster
    if ":" not in cluster:  # none, or "auto"
        return DEFAULT_URL
    _check_reachable(f"gcs://{cluster}", f"RAY_ADDRESS = {cluster}")
    with cluster_errors(f"RAY_ADDRESS = {cluster}"), _silent_stderr():
        key, namespace = DASHBOARD_ADDRESS.encode(), KV_NAMESPACE_DASHBOARD
        dashboard = GcsClient(address=cluster).internal_kv_get(key, namespace, timeout=CONNECT_TIMEOUT_S)
    if not dashboard:
        raise UserError(f"the Ray cluster at RAY_ADDRESS = {cluster} runs no dashboard, which jobs need")
    return f"http://{cluster.rpartition(':')[0]}:{dashboard.decode().rpartition(':')[2]}"


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray's C++ code writes to stderr before it raises the same error."""
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)


def _check_reachable(url: str, shown: str) -> None:
    """Raise UserError if nothing accepts connections at `url`: Ray's client would wait for minutes."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(shown, error) from None


def _unreachable(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster at {address} ({one_line(error)}); start one with `ray start --head`, or give "
        "--address http://HOST:8265 of its dashboard (through an SSH tunnel or kubectl port-forward, if need be)"
    )


@contextmanager
def cluster_errors(address: str) -> Iterator[None]:
    """Turn the exceptions of Ray's client into a UserError that names the address."""
    try:
        yield
    except AuthenticationError:
        raise UserError(_token_message(address)) from None
    except RpcError as error:
        raise _unreachable(address, error) from None
    except BrokenPipeError:  # of stdout
        raise
    except (OSError, aiohttp.ClientError) as error:  # exceptions of `requests` are OSErrors
        raise _unreachable(address, error) from None
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the cluster at {address} refused: {last_line(error)}") from None


def _token_message(address: str) -> str:
    token, source = ray_token()
    problem = f"does not accept the token of {source}" if token else "requires a token, and this machine has none"
    return (
        f"the Ray cluster at {address} {problem}; if this is the right cluster, put the token that "
        "`ray get-auth-token` prints on its head node into ~/.ray/auth_token or RAY_AUTH_TOKEN here"
    )


def last_line(error: object) -> str:
    """The last line of an exception or of a traceback that came over HTTP."""
    return (str(error).rstrip(" .\n").splitlines() or [type(error).__name__])[-1][:300]
