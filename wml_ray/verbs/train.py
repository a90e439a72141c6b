"""The verbs as functions: what a run would be, and one run from its config to its result."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wml_ray.cluster.preflight import require_checks
from wml_ray.cluster.resources import worker_range
from wml_ray.cluster.train import DELIVERY_S, fit
from wml_ray.config.schema import Config
from wml_ray.errors import Diverged, UserError, one_line
from wml_ray.report.run_report import write_files
from wml_ray.storage.files import check_storage, read_json, write_json, write_text
from wml_ray.storage.lease import Lease, exclusive_access
from wml_ray.storage.retry import retry_storage
from wml_ray.tracking.client import check_reachable, explain_connection_errors, redacted, tracking_uri
from wml_ray.tracking.runs import MetricLogger, TrackedRun, close_run, open_run
from wml_ray.training.events import OnEvent
from wml_ray.training.result import RESULT, log_result
from wml_ray.training.start import load_or_create_checkpoint


@dataclass(frozen=True)
class RunResult:
    """A finished run: its result, where MLflow has it, and what could not be delivered there."""

    result: dict[str, Any]
    folder: Path
    tracked: TrackedRun
    trained_now: bool
    undelivered: int


def train(config: Config, on_event: OnEvent) -> RunResult:
    """Train, or resume the same run if it was interrupted, or return the result it has.

    Raises:
        UserError: the user's mistake, found before anything is written.
        Diverged: training turned non-finite; the MLflow run is FAILED and the last good checkpoint stays.
    """
    folder = config.run_folder
    check_storage(folder)
    result = stored_result(config)
    if result and _identity(folder)["delivered"]:
        return RunResult(result, folder, TrackedRun(**_identity(folder)["tracked"]), False, 0)
    with exclusive_access(folder) as lease:
        result = stored_result(config)
        return _deliver(config, result) if result else _train(config, on_event, lease)


def _train(config: Config, on_event: OnEvent, lease: Lease) -> RunResult:
    folder = config.run_folder
    check_reachable(tracking_uri())
    require_checks(config)
    load_or_create_checkpoint(config, max(worker_range(config)[1], 1), lease)
    write_text(folder / "config.yaml", config.to_yaml())
    tracked = _open(config, _identity(folder)["token"])
    _remember(folder, tracked, delivered=False)
    try:
        undelivered = fit(config, tracked, on_event, lease)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        reason = one_line(error)
        close_run(tracked, status, reason=reason)
        if isinstance(error, Diverged):
            raise Diverged(f"{error}; the last good checkpoint is kept in {folder / 'checkpoints'}") from None
        raise
    result = stored_result(config)
    assert result is not None
    if undelivered == 0:
        undelivered = _publish(folder, tracked, result)
    return RunResult(result, folder, tracked, True, undelivered)


def _deliver(config: Config, result: dict[str, Any]) -> RunResult:
    """The result a run has; what MLflow missed when it finished is delivered now."""
    folder = config.run_folder
    identity = _identity(folder)
    try:
        check_reachable(tracking_uri())
    except UserError:  # the result is there all the same
        return RunResult(result, folder, TrackedRun(**identity["tracked"]), False, 1)
    tracked = _open(config, identity["token"])
    tracker = MetricLogger(tracked)
    log_result(result, tracker.log)
    undelivered = tracker.close(DELIVERY_S) or _publish(folder, tracked, result)
    return RunResult(result, folder, tracked, False, undelivered)


def _open(config: Config, token: str) -> TrackedRun:
    tags = {"wml_ray.run_id": config.run_id}
    with explain_connection_errors():
        return open_run(config.run.name, config.run_id, token, config.flatten(), tags)


def _publish(folder: Path, tracked: TrackedRun, result: dict[str, Any]) -> int:
    """Artifacts and final status; 0, or 1 if MLflow did not take them."""
    files = retry_storage(lambda: write_files(result, folder / "report"), folder)
    if not close_run(tracked, "FINISHED", [folder / "config.yaml", *files]):
        return 1
    _remember(folder, tracked, delivered=True)
    return 0


def _identity(folder: Path) -> dict[str, Any]:
    """A token drawn when the folder was made: the MLflow run that carries it is this folder's run."""
    path = folder / "run.json"
    identity = read_json(path)
    if identity is None:
        identity = {"token": uuid.uuid4().hex, "tracked": None, "delivered": False}
        write_json(path, identity)
    return identity


def _remember(folder: Path, tracked: TrackedRun, delivered: bool) -> None:
    public = {**vars(tracked), "uri": redacted(tracked.uri)}
    write_json(folder / "run.json", {**_identity(folder), "tracked": public, "delivered": delivered})


def stored_result(config: Config) -> dict[str, Any] | None:
    return read_json(config.run_folder / RESULT)
