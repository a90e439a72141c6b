"""Connection to a cluster's job server."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from wml_ray.errors import UserError, one_line

DASHBOARD_PORT = 8265
API_VARIABLE = "RAY_API_SERVER_ADDRESS"
ANSWER_S = 8.0


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server: at `address`, or where Ray's own variables say, or on this machine.

    Raises:
        UserError: no such address, nobody answers there, or the cluster does not accept our token.
    """
    logging.disable(logging.WARNING)  # Ray's remarks on addresses and tokens: what matters becomes a sentence
    where = address or os.environ.get(API_VARIABLE) or _dashboard_of(os.environ.get("RAY_ADDRESS", ""))
    if "://" not in where:
        raise UserError(
            f"'{where}' is no address of a Ray dashboard; give --address http://HOST:8265 (jobs do not go to the port "
            "that nodes join)"
        )
    os.environ[API_VARIABLE] = where  # it would win over an address that the client is given
    _check_answers(where)
    with cluster_errors(where):
        try:
            return JobSubmissionClient(where)
        except AuthenticationError:
            token, _ = _token()
            if not token:
                raise
            return JobSubmissionClient(where, headers={"Authorization": f"Bearer {token}"})


def _dashboard_of(cluster: str) -> str:
    """Of the address by which `wml-ray` joins a cluster: the same host's, or this machine's where it names none."""
    host = cluster.rpartition(":")[0]
    return cluster if "://" in cluster else f"http://{host or '127.0.0.1'}:{DASHBOARD_PORT}"


def _check_answers(address: str) -> None:
    """An address that swallows packets would hold up Ray's client for minutes."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=ANSWER_S).close()
    except (OSError, ValueError) as error:
        raise _unreachable(address, error) from None


def _unreachable(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address} ({one_line(error)}); start one with `ray start --head`, or give "
        "--address http://HOST:8265 of its dashboard (through an SSH tunnel or kubectl port-forward, if need be)"
    )


@contextmanager
def cluster_errors(address: str) -> Iterator[None]:
    """What Ray's client raises, as a sentence with the mend."""
    try:
        yield
    except AuthenticationError:
        raise UserError(_token_sentence(address)) from None
    except BrokenPipeError:  # nobody reads what we print
        raise
    except (OSError, aiohttp.ClientError) as error:  # what `requests` raises is an OSError
        raise _unreachable(address, error) from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the cluster at {address} refused: {last_line(error)}") from None


def _token_sentence(address: str) -> str:
    token, source = _token()
    said = f"does not accept the token of {source}" if token else "asks for a token, and there is none here"
    return (
        f"the Ray cluster at {address} {said}; `ray get-auth-token` on its head node prints the right one: put it into "
        "~/.ray/auth_token or RAY_AUTH_TOKEN here"
    )


def _token() -> tuple[str, str]:
    """Ray's token on this machine and where it is from, in Ray's order; found also without RAY_AUTH_MODE=token."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", str(path)


def last_line(error: object) -> str:
    """What was raised, out of a traceback that came over HTTP."""
    return (str(error).rstrip(" .\n").splitlines() or [type(error).__name__])[-1][:300]
