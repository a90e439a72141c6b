"""MLflow, imported here alone: one run a training, metrics delivered from a thread that never holds up a step."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wml_ray.config import UserError
from wml_ray.delivery import Deliveries, first_cause
from wml_ray.storage import local_files

DEFAULT_STORE = "mlflow.db"
CONNECT_S, ANSWER_S = 3, 6  # how long a server may take to be there, and to answer, before the run starts
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_LOCAL_SCHEMES = ("sqlite", "databricks")
REASON_TAG = "wml_ray.reason"
TOKEN_TAG = "wml_ray.token"
VARIABLES = tuple(f"MLFLOW_TRACKING_{name}" for name in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS"))
SILENT = "MLflow does not answer ({}); training goes on, metrics wait"


@dataclass(frozen=True)
class TrackedRun:
    """Where a run is in MLflow; plain data that travels to a worker."""

    uri: str
    experiment_id: str
    run_id: str

    @property
    def command(self) -> str:
        """The one command, or address, that shows the run."""
        if self.uri.startswith("http"):
            return f"{shown(self.uri)}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        program = shutil.which("mlflow") or Path(sys.executable).with_name("mlflow")
        return f"{program} ui --backend-store-uri {shown(self.uri)}"


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else an sqlite file in the working directory; absolute, so that workers find it too."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_STORE}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def environment() -> dict[str, str]:
    """What authenticates a client, for processes on other nodes."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def is_local(uri: str) -> bool:
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
            f"MLFLOW_TRACKING_URI = '{shown(uri)}' is no address of an MLflow store; write http://HOST:PORT for a "
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
            f"MLFLOW_TRACKING_URI = '{shown(uri)}': the MLflow server does not answer ({first_cause(error)}); start "
            f"it, mend the address, or unset MLFLOW_TRACKING_URI to log to ./{DEFAULT_STORE}"
        ) from None


@contextmanager
def gone_is_a_sentence() -> Iterator[None]:
    """What a client raises is the sentence of `check_reachable`, if the server has gone away since that was called."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        check_reachable(tracking_uri())
        raise


def is_gone() -> bool:
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


def open_run(
    experiment: str, name: str, token: str, params: Mapping[str, object], tags: Mapping[str, str] | None = None
) -> TrackedRun:
    """The MLflow run that carries `token`, or a new one of this name. It is RUNNING afterwards."""
    uri = tracking_uri()
    client = client_of(uri)
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else _create_experiment(client, experiment)
    runs = client.search_runs([experiment_id], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
    if runs:
        run = runs[0]
        client.update_run(run.info.run_id, status="RUNNING")
        if REASON_TAG in run.data.tags:
            client.delete_tag(run.info.run_id, REASON_TAG)
    else:
        run = client.create_run(experiment_id, run_name=name, tags={TOKEN_TAG: token, **(tags or {})})
    tracked = TrackedRun(uri, experiment_id, run.info.run_id)
    _log_params(client, tracked, params, known=run.data.params)
    return tracked


def finish_run(
    tracked: TrackedRun, status: str, artifacts: Sequence[Path] = (), tags: Mapping[str, str] | None = None
) -> None:
    """Log files and tags, and set the status FINISHED, FAILED or KILLED."""
    client = client_of(tracked.uri)
    for path in artifacts:
        _log_file(client, tracked, path, "pictures" if path.suffix == ".png" else None)
    for key, value in (tags or {}).items():
        client.set_tag(tracked.run_id, key, value[:5000])
    client.set_terminated(tracked.run_id, status)


def log_files(tracked: TrackedRun, files: Sequence[Path], folder: str | None = None) -> None:
    """Log files, under `folder` among the run's artifacts."""
    client = client_of(tracked.uri)
    for path in files:
        _log_file(client, tracked, path, folder)


def _log_file(client: Any, tracked: TrackedRun, path: Path, folder: str | None) -> None:
    with local_files(path.parent, [path.name]) as here:
        client.log_artifact(tracked.run_id, str(here / path.name), folder)


def close_run(tracked: TrackedRun, status: str, artifacts: Sequence[Path] = (), reason: str = "") -> bool:
    """`finish_run` for one's last words: False, with a warning, if MLflow does not answer."""
    try:
        finish_run(tracked, status, artifacts, {REASON_TAG: reason[:500]} if reason else None)
    except Exception as error:  # the training is done and on disk; a silent server must not take it away
        warnings.warn(f"MLflow could not be told that the run is {status} ({first_cause(error)})", stacklevel=2)
        return False
    return True


class Sender:
    """Sends the metrics of one run, each step exactly once.

    Before the first step, and again after every failure, the steps the server already has are read, so neither a
    resumed run nor a request whose answer got lost logs anything twice.
    """

    def __init__(self, tracked: TrackedRun) -> None:
        self.tracked = tracked
        self._steps_on_server: dict[str, set[int]] = {}

    def send(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        try:
            self._send(step, metrics, timestamp_ms)
        except Exception:
            self._steps_on_server.clear()
            raise

    def _send(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        from mlflow.entities import Metric

        client = client_of(self.tracked.uri)
        marker = next(iter(metrics))
        if marker not in self._steps_on_server:
            history = client.get_metric_history(self.tracked.run_id, marker)
            self._steps_on_server[marker] = {metric.step for metric in history}
        if step not in self._steps_on_server[marker]:
            entities = [Metric(key, value, timestamp_ms, step) for key, value in metrics.items()]
            client.log_batch(self.tracked.run_id, metrics=entities)
            self._steps_on_server[marker].add(step)


class Tracker:
    """Metrics of one run, sent from a thread in order; what cannot be sent waits until the server is back."""

    def __init__(self, tracked: TrackedRun, system_metrics: bool = False) -> None:
        self._sender = Sender(tracked)
        self._deliveries = Deliveries(SILENT)
        self._monitor = _system_monitor(tracked) if system_metrics else None

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Queue the metrics of one step; returns at once."""
        self._deliveries.put(partial(self._sender.send, step, dict(metrics), timestamp_ms))

    def close(self, timeout_s: float) -> int:
        """Wait for delivery; returns the steps that could not be delivered in time."""
        if self._monitor is not None:
            self._monitor.finish()
        return self._deliveries.close(timeout_s)


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


def shown(uri: str) -> str:
    """The address without user name and password."""
    scheme, separator, rest = uri.partition("?")[0].partition("://")  # drivers take a password behind ? too
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"


def _create_experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another process made it in the meantime
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _log_params(client: Any, tracked: TrackedRun, params: Mapping[str, object], known: Mapping[str, str]) -> None:
    """Params cannot change once logged, so a resumed run adds only what is missing."""
    from mlflow.entities import Param

    missing = [Param(key, str(value)) for key, value in params.items() if key not in known]
    for start in range(0, len(missing), 100):
        client.log_batch(tracked.run_id, params=missing[start : start + 100])


def _system_monitor(tracked: TrackedRun) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(tracked.run_id, resume_logging=True, tracking_uri=tracked.uri)
    monitor.start()
    return monitor
