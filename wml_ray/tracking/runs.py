"""Runs in MLflow: opened, logged to from a background thread, finished."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wml_ray.errors import root_cause
from wml_ray.storage.files import local_files
from wml_ray.storage.retry import RetryQueue
from wml_ray.tracking.client import client_of, redacted, tracking_uri
from wml_ray.tracking.tags import REASON_TAG, TOKEN_TAG

UNREACHABLE = "MLflow does not answer ({}); training goes on, metrics wait"


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
            return f"{redacted(self.uri)}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        program = shutil.which("mlflow") or Path(sys.executable).with_name("mlflow")
        return f"{program} ui --backend-store-uri {redacted(self.uri)}"


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
        warnings.warn(f"MLflow could not be told that the run is {status} ({root_cause(error)})", stacklevel=2)
        return False
    return True


class MetricSender:
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


class MetricLogger:
    """Metrics of one run, sent from a thread in order; what cannot be sent waits until the server is back."""

    def __init__(self, tracked: TrackedRun, system_metrics: bool = False) -> None:
        self._sender = MetricSender(tracked)
        self._deliveries = RetryQueue(UNREACHABLE)
        self._monitor = _system_monitor(tracked) if system_metrics else None

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Queue the metrics of one step; returns at once."""
        self._deliveries.put(partial(self._sender.send, step, dict(metrics), timestamp_ms))

    def close(self, timeout_s: float) -> int:
        """Wait for delivery; returns the steps that could not be delivered in time."""
        if self._monitor is not None:
            self._monitor.finish()
        return self._deliveries.close(timeout_s)


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
