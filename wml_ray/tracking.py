"""MLflow, imported here alone: one run a training, metrics delivered from a thread that never holds up a step."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wml_ray.config import Config, UserError

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_STORE = "mlflow.db"
ANSWER_S = 8  # how long a server may take to answer before the run starts
RETRY_S = 2.0  # between two tries to reach a server that went away
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_LOCAL_SCHEMES = ("sqlite", "databricks")
REASON_TAG = "wml_ray.reason"
TOKEN_TAG = "wml_ray.token"


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


def check_reachable(uri: str) -> None:
    """Raises:
    UserError: the address is none, or the tracking server does not answer within ten seconds.
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
        socket.create_connection((address.hostname, port or _PORTS[kind]), timeout=ANSWER_S / 2).close()
        _within(ANSWER_S / 2, lambda: _client(uri).search_experiments(max_results=1))
    except Exception as error:  # whatever a client library raises: it is reported, not hidden
        raise UserError(
            f"MLFLOW_TRACKING_URI = '{shown(uri)}': the MLflow server does not answer ({_reason(error)}); start it, "
            f"mend the address, or unset MLFLOW_TRACKING_URI to log to ./{DEFAULT_STORE}"
        ) from None


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


def open_run(config: Config, token: str, tags: Mapping[str, str] | None = None) -> TrackedRun:
    """The MLflow run of this training: the one that carries `token`, or a new one. It is RUNNING afterwards."""
    uri = tracking_uri()
    client = _client(uri)
    experiment = client.get_experiment_by_name(config.run.name)
    experiment_id = experiment.experiment_id if experiment else _create_experiment(client, config.run.name)
    found = client.search_runs([experiment_id], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
    if found:
        run = found[0]
        client.update_run(run.info.run_id, status="RUNNING")
        if REASON_TAG in run.data.tags:
            client.delete_tag(run.info.run_id, REASON_TAG)
    else:
        all_tags = {TOKEN_TAG: token, "wml_ray.run_id": config.run_id, **(tags or {})}
        run = client.create_run(experiment_id, run_name=config.run_id, tags=all_tags)
    tracked = TrackedRun(uri, experiment_id, run.info.run_id)
    _log_params(client, tracked, config, known=run.data.params)
    return tracked


def close_run(tracked: TrackedRun, status: str, artifacts: Sequence[Path] = (), reason: str = "") -> bool:
    """Log files and set the status FINISHED, FAILED or KILLED; False, with a warning, if MLflow does not answer."""
    try:
        client = _client(tracked.uri)
        for path in artifacts:
            client.log_artifact(tracked.run_id, str(path), "pictures" if path.suffix == ".png" else None)
        if reason:
            client.set_tag(tracked.run_id, REASON_TAG, reason[:500])
        client.set_terminated(tracked.run_id, status)
    except Exception as error:  # the training is done and on disk; a silent server must not take it away
        warnings.warn(f"MLflow could not be told that the run is {status} ({_reason(error)})", stacklevel=2)
        return False
    return True


def finished_runs(experiment: str) -> pd.DataFrame:
    """The finished runs of an experiment, best weighted ensemble on the validation images first.

    Columns: `run`, every metric under its MLflow name, every param, and `peers`, a list of dicts with the keys `peer`,
    `macs`, `params`, `val`, `test` and `weight`.

    Raises:
        UserError: there is no such experiment, or no run of it has finished.
    """
    import pandas as pd

    uri = tracking_uri()
    check_reachable(uri)
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).exists():  # opening it would make it
        raise UserError(f"experiment '{experiment}': there is no {path} here; set MLFLOW_TRACKING_URI, or train first")
    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments()) or "none"
        raise UserError(f"experiment '{experiment}' is not on {shown(uri)}; there are: {names}")
    runs = client.search_runs([found.experiment_id], "attributes.status = 'FINISHED'", max_results=1000)
    rows = [{"run": run.info.run_name, **_metrics_of(client, run), **run.data.params} for run in runs]
    rows = [{**row, "peers": _peers_of(row)} for row in rows if "test/accuracy/ensemble_weighted" in row]
    if not rows:
        raise UserError(f"experiment '{experiment}' has no finished run yet; wait, or start one with wml-ray train")
    return pd.DataFrame(rows).sort_values("val/accuracy/ensemble_weighted", ascending=False, ignore_index=True)


def _metrics_of(client: Any, run: Any) -> dict[str, float]:
    """Metrics at the epoch the test accuracy is of, which need not be the last."""
    metrics = dict(run.data.metrics)
    if run.data.params.get("run.test_epoch") != "best":
        return metrics
    tested = {entry.step for key in metrics if key.startswith("test/") for entry in _history(client, run, key)}
    for key in metrics:
        if key.startswith(("val/", "weights/")):
            metrics[key] = next(entry.value for entry in _history(client, run, key) if entry.step in tested)
    return metrics


def _history(client: Any, run: Any, key: str) -> Any:
    return client.get_metric_history(run.info.run_id, key)


def _peers_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {"macs": "peers/macs", "params": "peers/params", "val": "val/accuracy", "test": "test/accuracy"}
    names["weight"] = "weights"
    count = sum(key.startswith("test/accuracy/peer") for key in row)
    return [
        {"peer": index, **{short: row[f"{name}/peer{index}"] for short, name in names.items()}}
        for index in range(count)
    ]


class Tracker:
    """Sends metrics to one run, each exactly once, in order; what cannot be sent waits until the server is back.

    Before a step is sent, and again after every failure, the steps the server already has are read, so neither a
    resumed run nor a request whose answer got lost logs anything twice.
    """

    def __init__(self, tracked: TrackedRun, system_metrics: bool = False) -> None:
        self.tracked = tracked
        self._queue: deque[tuple[int, int, dict[str, float]]] = deque()
        self._wake = threading.Condition()
        self._closing = self._abandoned = False
        self._steps_on_server: dict[str, set[int]] = {}
        self._monitor = _system_monitor(tracked) if system_metrics else None
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Queue the metrics of one step; returns at once."""
        with self._wake:
            self._queue.append((step, timestamp_ms, dict(metrics)))
            self._wake.notify()

    def close(self, timeout_s: float) -> int:
        """Wait for delivery; returns the steps that could not be delivered in time."""
        if self._monitor is not None:
            self._monitor.finish()
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        with self._wake:
            self._abandoned = True  # whoever delivers the rest must be the only one
            return len(self._queue)

    def _deliver(self) -> None:
        warned = False
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if not self._queue or self._abandoned:
                    return
                step, timestamp_ms, metrics = self._queue[0]
            try:
                self._send(step, timestamp_ms, metrics)
            except Exception as error:  # any failure of server, network or client: keep the metrics and try again
                self._steps_on_server.clear()
                if not warned:
                    warned = True
                    warnings.warn(
                        f"MLflow does not answer ({_reason(error)}); training goes on, metrics wait", stacklevel=1
                    )
                time.sleep(RETRY_S)
                continue
            warned = False
            with self._wake:
                self._queue.popleft()

    def _send(self, step: int, timestamp_ms: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        client = _client(self.tracked.uri)
        marker = next(iter(metrics))
        if marker not in self._steps_on_server:
            history = client.get_metric_history(self.tracked.run_id, marker)
            self._steps_on_server[marker] = {metric.step for metric in history}
        if step not in self._steps_on_server[marker]:
            entities = [Metric(key, value, timestamp_ms, step) for key, value in metrics.items()]
            client.log_batch(self.tracked.run_id, metrics=entities)
            self._steps_on_server[marker].add(step)


def _client(uri: str) -> Any:
    """A client that fails within seconds instead of retrying for minutes: Tracker does its own retrying."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ANSWER_S // 2))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for noisy in ("mlflow", "mlflow.store.db.utils", "alembic"):  # after the import, which sets them to INFO
        logging.getLogger(noisy).setLevel(logging.WARNING)

    return MlflowClient(uri)


def _reason(error: BaseException) -> str:
    """The first cause in one short line: "Connection refused" rather than what four layers made of it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:200]


def shown(uri: str) -> str:
    """The address without user name and password."""
    scheme, separator, rest = uri.partition("://")
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


def _log_params(client: Any, tracked: TrackedRun, config: Config, known: Mapping[str, str]) -> None:
    """Params cannot change once logged, so a resumed run adds only what is missing."""
    from mlflow.entities import Param

    params = [Param(key, str(value)) for key, value in config.flatten().items() if key not in known]
    for start in range(0, len(params), 100):
        client.log_batch(tracked.run_id, params=params[start : start + 100])


def _system_monitor(tracked: TrackedRun) -> Any:
    import mlflow
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    mlflow.set_tracking_uri(tracked.uri)
    monitor = SystemMetricsMonitor(tracked.run_id, resume_logging=True)
    monitor.start()
    return monitor
