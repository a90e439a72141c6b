"""The verb `train` as a function: one run from its config to its result."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wml_ray.cluster.preflight import require_checks
from wml_ray.cluster.train import DELIVERY_S, fit
from wml_ray.config.load import as_config
from wml_ray.config.schema import Config
from wml_ray.config.title import run_title
from wml_ray.errors import Diverged, UserError, one_line
from wml_ray.report.run_report import peer_markdown, write_files
from wml_ray.storage.files import check_storage, read_json, write_json, write_text
from wml_ray.storage.lease import Lease, exclusive_access
from wml_ray.storage.retry import retry_storage
from wml_ray.tracking.client import check_reachable, explain_connection_errors, redacted, tracking_uri
from wml_ray.tracking.origin import dataset_inputs
from wml_ray.tracking.runs import MetricLogger, TrackedRun, close_run, open_run
from wml_ray.tracking.tags import NOTE_TAG, REASON_TAG, RUN_ID_TAG
from wml_ray.training.events import OnEvent
from wml_ray.training.result import log_result, stored_result
from wml_ray.training.start import load_or_create_checkpoint
from wml_ray.verbs.progress import TrainingProgress
from wml_ray.verbs.run import Run


def train(config: str | Path | Mapping[str, Any] | Config, on_event: OnEvent | None = None, **overrides: Any) -> Run:
    """Train a run, resume it if it was interrupted, or return the result of a finished one.

    `config` is a Config, a YAML file, or nested settings. `overrides` are sections with keys, `wml={"alpha": 0.3}`, or
    dotted keys, `**{"wml.alpha": 0.3}`. `on_event` is called with each StepProgress and EpochEnd in place of the
    progress that is shown by default. Ctrl-C leaves a run that the same call resumes.

    Raises:
        UserError: a mistake in the config, or an unusable storage, cluster, dataset or MLflow server.
        Diverged: training became non-finite; the MLflow run is FAILED and the last good checkpoint is kept.
    """
    config = as_config(config, overrides)
    if on_event is None:
        with TrainingProgress(config) as progress:
            return train(config, progress)
    folder = config.run_folder
    check_storage(folder)
    result = stored_result(config)
    if result and _run_record(folder)["delivered"]:
        return _run(result, folder, TrackedRun(**_run_record(folder)["tracked"]), False, 0)
    with exclusive_access(folder) as lease:
        result = stored_result(config)
        return _deliver(config, result) if result else _train(config, on_event, lease)


def _train(config: Config, on_event: OnEvent, lease: Lease) -> Run:
    folder = config.run_folder
    check_reachable(tracking_uri())
    require_checks(config)
    load_or_create_checkpoint(config, max(config.scale.worker_range[1], 1), lease)
    write_text(folder / "config.yaml", config.to_yaml())
    tracked = _open(config, _run_record(folder)["token"])
    _write_run_record(folder, tracked, delivered=False)
    try:
        undelivered = fit(config, tracked, on_event, lease)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        close_run(tracked, status, tags={REASON_TAG: one_line(error, limit=500)})
        if isinstance(error, Diverged):
            raise Diverged(f"{error}; the last good checkpoint is kept in {folder / 'checkpoints'}") from None
        raise
    result = stored_result(config)
    assert result is not None
    if undelivered == 0:
        undelivered = _publish(folder, tracked, result)
    return _run(result, folder, tracked, True, undelivered)


def _deliver(config: Config, result: dict[str, Any]) -> Run:
    """Log the metrics and files that MLflow lacks of a finished run."""
    folder = config.run_folder
    record = _run_record(folder)
    try:
        check_reachable(tracking_uri())
    except UserError:  # the result can be returned without MLflow
        if record["tracked"] is None:
            raise
        return _run(result, folder, TrackedRun(**record["tracked"]), False, 1)
    tracked = _open(config, record["token"])
    tracker = MetricLogger(tracked)
    log_result(result, tracker.log)
    undelivered = tracker.close(DELIVERY_S) or _publish(folder, tracked, result)
    return _run(result, folder, tracked, False, undelivered)


def _run(result: dict[str, Any], folder: Path, tracked: TrackedRun, trained_now: bool, undelivered: int) -> Run:
    """The run of the caller's own config, whose code is trusted."""
    return Run(folder, result, tracked, True, trained_now, undelivered)


def _open(config: Config, token: str) -> TrackedRun:
    with explain_connection_errors():
        return open_run(config.run.name, run_title(config), token, config.flatten(), {RUN_ID_TAG: config.run_id})


def _publish(folder: Path, tracked: TrackedRun, result: dict[str, Any]) -> int:
    """Log the artifacts and the final status; returns 0, or 1 if MLflow did not accept them."""
    files = retry_storage(lambda: write_files(result, folder / "report"), folder)
    note, inputs = {NOTE_TAG: peer_markdown(result)}, dataset_inputs(result)
    if not close_run(tracked, "FINISHED", artifacts=[folder / "config.yaml", *files], tags=note, inputs=inputs):
        return 1
    _write_run_record(folder, tracked, delivered=True)
    return 0


def _run_record(folder: Path) -> dict[str, Any]:
    """The folder's run.json, created if it is missing. Its random token is a tag of the folder's MLflow run."""
    path = folder / "run.json"
    remedy = "delete it: the run continues, in a new MLflow run"
    record = read_json(path, remedy, ("token", "tracked", "delivered"))
    if record is None:
        record = {"token": uuid.uuid4().hex, "tracked": None, "delivered": False}
        write_json(path, record)
    return record


def _write_run_record(folder: Path, tracked: TrackedRun, delivered: bool) -> None:
    public = {**vars(tracked), "uri": redacted(tracked.uri)}
    write_json(folder / "run.json", {**_run_record(folder), "tracked": public, "delivered": delivered})
