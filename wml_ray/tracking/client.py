"""The address of the tracking server or store, MLflow's client for it, and the check that it answers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wml_ray.errors import UserError, root_cause
from wml_ray.storage.retry import call_within

DEFAULT_STORE = "mlflow.db"
CONNECT_S, RESPONSE_S = 3, 6  # time limits for a connection to the server, and for a response
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_LOCAL_SCHEMES = ("sqlite", "databricks")
TRACKING_VARIABLES = tuple(f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS"))


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or an sqlite file in the working directory. Paths are absolute, as workers need them."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_STORE}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def tracking_environment() -> dict[str, str]:
    """The environment variables that authenticate a client, for processes on other nodes."""
    return {name: os.environ[name] for name in TRACKING_VARIABLES if name in os.environ}


def is_local_store(uri: str) -> bool:
    """True if the store is a file, which processes on other machines cannot open."""
    return urlsplit(uri).scheme.split("+")[0] in _LOCAL_SCHEMES


def check_reachable(uri: str) -> None:
    """Connect to the tracking server and read one experiment; for a file, check that it can be written.

    Raises:
        UserError: the address is malformed, or the server does not answer within ten seconds. The import of the client
            does not count.
    """
    kind, host, port = _parsed(uri)
    if kind in _LOCAL_SCHEMES:
        _check_file(uri)
        return
    try:
        _client_class()  # its import can take seconds, which are not the server's
        socket.create_connection((host, port or _PORTS[kind]), timeout=CONNECT_S).close()
        call_within(RESPONSE_S, lambda: client_of(uri).search_experiments(max_results=1))
    except Exception as error:  # client libraries raise errors of any type
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{redacted(uri)}': the MLflow server does not answer ({root_cause(error)}); start "
            f"it, correct the address, or unset MLFLOW_TRACKING_URI to log to ./{DEFAULT_STORE}"
        ) from None


def _parsed(uri: str) -> tuple[str, str | None, int | None]:
    """Scheme without its driver, host and port."""
    try:
        address = urlsplit(uri)
        kind, port = address.scheme.split("+")[0], address.port
        valid = kind in _LOCAL_SCHEMES or (kind in _PORTS and bool(address.hostname))
    except ValueError:  # the port is not a number
        valid = False
    if not valid:
        hint = "; write / ? # @ in a password as %2F %3F %23 %40" if "@" in uri else ""
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{redacted(uri)}' is not the address of an MLflow store; write http://HOST:PORT "
            f"for a server, sqlite:///FILE for a file, or unset it to log to ./{DEFAULT_STORE}{hint}"
        )
    return kind, address.hostname, port


@contextmanager
def explain_connection_errors() -> Iterator[None]:
    """Turn an error of the client into that of `check_reachable` if the server no longer answers."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        check_reachable(tracking_uri())
        raise


def _check_file(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{uri}': {path} cannot be written; name another file, or unset it to log to "
            f"./{DEFAULT_STORE}"
        )


def client_of(uri: str) -> Any:
    """An MLflow client that fails within seconds instead of retrying for minutes; `RetryQueue` retries."""
    return _client_class()(uri)


def _client_class() -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(RESPONSE_S))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would break the live table
    from mlflow import MlflowClient

    for noisy in ("mlflow", "mlflow.store.db.utils", "alembic"):  # after the import, which sets them to INFO
        logging.getLogger(noisy).setLevel(logging.WARNING)

    return MlflowClient


def redacted(uri: str) -> str:
    """The address without user name, password and query, in which drivers take a password too.

    All between `//` and the last `@` is removed, so a raw `/`, `?` or `#` in a password is removed with it. Where an
    `@` may belong to the query, only the scheme is kept.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri.rpartition("@")[2]
    before, at, after = rest.rpartition("@")
    if at and "?" in before and "=" in before.partition("?")[2]:
        return f"{scheme}://..."
    if rest.startswith("/"):  # the path of a local file, which may contain an @
        after = rest
    return f"{scheme}://{after.partition('?')[0]}"
