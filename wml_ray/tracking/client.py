"""MLflow, imported here alone: one run a training, metrics delivered from a thread that never holds up a step."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wml_ray.errors import UserError, root_cause

DEFAULT_STORE = "mlflow.db"
CONNECT_S, ANSWER_S = 3, 6  # how long a server may take to be there, and to answer, before the run starts
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_LOCAL_SCHEMES = ("sqlite", "databricks")
TRACKING_VARIABLES = tuple(f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS"))


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else an sqlite file in the working directory; absolute, so that workers find it too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_STORE}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def tracking_environment() -> dict[str, str]:
    """What authenticates a client, for processes on other nodes."""
    return {name: os.environ[name] for name in TRACKING_VARIABLES if name in os.environ}


def is_local_store(uri: str) -> bool:
    """Whether the store is a file, which only processes of its machine see."""
    return urlsplit(uri).scheme.split("+")[0] in _LOCAL_SCHEMES


def check_reachable(uri: str) -> None:
    """Raises:
    UserError: the address is none, or the tracking server does not answer within ten seconds, its client's import
        not counted.
    """
    try:
        address = urlsplit(uri)
        kind, port = address.scheme.split("+")[0], address.port
        understood = kind in _LOCAL_SCHEMES or (kind in _PORTS and bool(address.hostname))
    except ValueError:  # a port that is no number
        understood = False
    if not understood:
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{redacted(uri)}' is no address of an MLflow store; write http://HOST:PORT for a "
            f"server, sqlite:///FILE for a file, or unset it to log to ./{DEFAULT_STORE}"
        )
    if kind in _LOCAL_SCHEMES:
        _check_file(uri)
        return
    try:
        _client_class()  # its import can take as long as an answer, and is not the server's time
        socket.create_connection((address.hostname, port or _PORTS[kind]), timeout=CONNECT_S).close()
        _within(ANSWER_S, lambda: client_of(uri).search_experiments(max_results=1))
    except Exception as error:  # whatever a client library raises: it is reported, not hidden
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{redacted(uri)}': the MLflow server does not answer ({root_cause(error)}); start "
            f"it, mend the address, or unset MLFLOW_TRACKING_URI to log to ./{DEFAULT_STORE}"
        ) from None


@contextmanager
def explain_connection_errors() -> Iterator[None]:
    """What a client raises is the sentence of `check_reachable`, if the server has gone away since that was called."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        check_reachable(tracking_uri())
        raise


def is_unreachable() -> bool:
    """Whether the server has stopped to answer."""
    try:
        check_reachable(tracking_uri())
    except UserError:
        return True
    return False


def _check_file(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{uri}': {path} cannot be written; name a file that can, or unset it to log to "
            f"./{DEFAULT_STORE}"
        )


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Run `call` in a thread and give up on it in time: a database client retries for minutes."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")


def client_of(uri: str) -> Any:
    """An MLflow client that fails within seconds instead of retrying for minutes: Tracker does its own retrying."""
    return _client_class()(uri)


def _client_class() -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_S))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would tear the live table
    from mlflow import MlflowClient

    for noisy in ("mlflow", "mlflow.store.db.utils", "alembic"):  # after the import, which sets them to INFO
        logging.getLogger(noisy).setLevel(logging.WARNING)

    return MlflowClient


def redacted(uri: str) -> str:
    """The address without user name and password."""
    scheme, separator, rest = uri.partition("?")[0].partition("://")  # drivers take a password behind ? too
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"
