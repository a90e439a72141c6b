"""Runs in MLflow: created or reopened, logged to from a background thread, ended."""

from __future__ import annotations

import shutil
import sys
import time
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
from wml_ray.tracking.origin import source_tags
from wml_ray.tracking.tags import REASON_TAG, TOKEN_TAG

UNREACHABLE = "MLflow does not answer ({}); training continues and the metrics are queued"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # without it MLflow 3 shows a GenAI experiment
MAX_TAG = 5000  # characters that every MLflow store accepts


@dataclass(frozen=True)
class TrackedRun:
    """Address of a run in MLflow; plain data that can be sent to a worker."""

    uri: str
    experiment_id: str
    run_id: str

    @property
    def command(self) -> str:
        """The address of the run's page, or the command that starts the UI."""
        if self.uri.startswith("http"):
            return f"{redacted(self.uri)}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        program = shutil.which("mlflow") or Path(sys.executable).with_name("mlflow")
        return f"{program} ui --backend-store-uri {redacted(self.uri)}"


def open_run(
    experiment: str, name: str, token: str, params: Mapping[str, object], tags: Mapping[str, str] | None = None
) -> TrackedRun:
    """The MLflow run with the tag `token`, set to RUNNING again, or a new one named `name`."""
    uri = tracking_uri()
    client = client_of(uri)
    experiment_id = _experiment_id(client, experiment)
    runs = client.search_runs([experiment_id], f"tags.`{TOKEN_TAG}` = '{token}'", max_results=1)
    if runs:
        run = runs[0]
        client.update_run(run.info.run_id, status="RUNNING")
        if REASON_TAG in run.data.tags:
            client.delete_tag(run.info.run_id, REASON_TAG)
    else:
        all_tags = {**source_tags(), TOKEN_TAG: token, **(tags or {})}
        run = client.create_run(experiment_id, run_name=name, tags=all_tags)
    tracked = TrackedRun(uri, experiment_id, run.info.run_id)
    _log_params(client, tracked, params, known=run.data.params)
    return tracked


def finish_run(
    tracked: TrackedRun,
    status: str,
    artifacts: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    inputs: Sequence[Any] = (),
) -> None:
    """Log files, tags, metrics and dataset inputs, then set the status FINISHED, FAILED or KILLED.

    Metrics are logged at step 0, unless their value is the one that the run has.
    """
    from mlflow.entities import Metric

    client = client_of(tracked.uri)
    for path in artifacts:
        _log_file(client, tracked, path, "pictures" if path.suffix == ".png" else None)
    for key, value in (tags or {}).items():
        client.set_tag(tracked.run_id, key, value[:MAX_TAG])
    if metrics:
        timestamp_ms, known = time.time_ns() // 1_000_000, client.get_run(tracked.run_id).data.metrics
        changed = {key: value for key, value in metrics.items() if known.get(key) != value}
        client.log_batch(tracked.run_id, [Metric(key, value, timestamp_ms, 0) for key, value in changed.items()])
    if inputs:
        client.log_inputs(tracked.run_id, inputs)
    client.set_terminated(tracked.run_id, status)


def set_tags(tracked: TrackedRun, tags: Mapping[str, str]) -> None:
    """Set tags of a run."""
    client = client_of(tracked.uri)
    for key, value in tags.items():
        client.set_tag(tracked.run_id, key, value)


def log_files(tracked: TrackedRun, files: Sequence[Path], folder: str | None = None) -> None:
    """Log files as artifacts of the run, in `folder`."""
    client = client_of(tracked.uri)
    for path in files:
        _log_file(client, tracked, path, folder)


def _log_file(client: Any, tracked: TrackedRun, path: Path, folder: str | None) -> None:
    with local_files(path.parent, [path.name]) as here:
        client.log_artifact(tracked.run_id, str(here / path.name), folder)


def close_run(tracked: TrackedRun, status: str, **details: Any) -> bool:
    """`finish_run` that never raises: False, with a warning, if MLflow does not answer."""
    try:
        finish_run(tracked, status, **details)
    except Exception as error:  # the training has ended and is on disk: a failing server must not end the process
        warnings.warn(f"cannot set the MLflow run to {status} ({root_cause(error)})", stacklevel=2)
        return False
    return True


class MetricSender:
    """Sends the metrics of one run, each step exactly once.

    The steps that the server has are read before the first step and after every failure. So neither a resumed run nor
    a request whose response was lost logs a step twice.
    """

    def __init__(self, tracked: TrackedRun) -> None:
        self.tracked = tracked
        self._steps_on_server: dict[str, set[int]] = {}

    def send(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Send the metrics of one step unless the server has them; raises what the client raises."""
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
    """Sends the metrics of one run from a thread, in order, and retries until the server answers."""

    def __init__(self, tracked: TrackedRun, system_metrics: bool = False) -> None:
        self._sender = MetricSender(tracked)
        self._queue = RetryQueue(UNREACHABLE)
        self._monitor = _system_monitor(tracked) if system_metrics else None

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Queue the metrics of one step; returns at once."""
        self._queue.put(partial(self._sender.send, step, dict(metrics), timestamp_ms))

    def close(self, timeout_s: float) -> int:
        """Wait for delivery; returns the number of steps that were not delivered in time."""
        if self._monitor is not None:
            self._monitor.finish()
        return self._queue.close(timeout_s)


def _experiment_id(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, tags=EXPERIMENT_TAGS))
        except MlflowException:  # another process created it in the meantime
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    for key, value in EXPERIMENT_TAGS.items():
        if key not in found.tags:  # created by another program
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def _log_params(client: Any, tracked: TrackedRun, params: Mapping[str, object], known: Mapping[str, str]) -> None:
    """Params cannot change once logged, so a resumed run logs only the missing ones."""
    from mlflow.entities import Param

    missing = [Param(key, str(value)) for key, value in params.items() if key not in known]
    for start in range(0, len(missing), 100):
        client.log_batch(tracked.run_id, params=missing[start : start + 100])


def _system_monitor(tracked: TrackedRun) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(tracked.run_id, resume_logging=True, tracking_uri=tracked.uri)
    monitor.start()
    return monitor
