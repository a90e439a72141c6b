"""A run or a trial under Ray Train: in this process, on N workers, or on as many as the cluster has."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup

from wml_ray.checkpoints.checkpoint import DamagedCheckpoint
from wml_ray.cluster.connect import WorkerEnvironment, ray_folder, with_absolute_paths
from wml_ray.cluster.gauges import Gauges
from wml_ray.cluster.messages import DriverQueue
from wml_ray.cluster.preemption import PreemptionNotice
from wml_ray.cluster.resources import cpus_per_worker, worker_resources
from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.distributed import WorkerRank, broadcast_from_rank_0
from wml_ray.errors import Diverged, UserError
from wml_ray.storage.files import read_json, write_json
from wml_ray.storage.lease import Lease, LeaseLost
from wml_ray.storage.retry import StorageUnavailable, retry_storage
from wml_ray.tracking.runs import MetricLogger, TrackedRun
from wml_ray.training.events import EpochEnd, LogMetrics, OnEvent, StepProgress
from wml_ray.training.threads import torch_threads, training_threads
from wml_ray.training.worker import WorkerContext, run_worker

DELIVERY_S = 120.0  # for metrics that an unreachable tracking server lacks, after training
INTERRUPTED_DELIVERY_S = 5.0  # the same after an error or Ctrl-C
STATUS_FILE = "status.json"  # how the latest attempt ended, written by a worker and read by the driver
WORKER_START_TIMEOUT_S = 10  # for an elastic run's slots: Ray counts those of a lost node as free for up to 20 s
RESIZE_INTERVAL_S = 30.0  # between two checks of an elastic run for new nodes, for which all workers start again
RETRIED_ERRORS = (DamagedCheckpoint, LeaseLost, StorageUnavailable)  # not in the status file: a retry may help
HEALTH_CHECK_S = 0.5  # between two checks by Ray Train whether a worker has ended or died


def fit(config: Config, tracked: TrackedRun | None, on_event: OnEvent, lease: Lease | None = None) -> int:
    """Train to the end on the connected cluster; returns the number of steps that MLflow has not received.

    Metrics go to the MLflow run `tracked`, progress to `on_event` in this process. `lease` is on the run's folder.

    Raises:
        Diverged: training turned non-finite.
        UserError: a mistake in the user's input that only a worker meets, such as an image that cannot be read.
    """
    name = uuid.uuid4().hex
    environment = WorkerEnvironment.capture(config.run_folder, config.data, lease, tracked)
    if config.scale.workers == 0:
        return _train(config, {"on_event": on_event}, name, environment)
    with DriverQueue({"on_event": on_event}) as queue:
        return _train(config, {"on_event": queue.sender("on_event", acknowledge=False)}, name, environment)


def fit_trial(
    config: Config,
    log: LogMetrics,
    on_placement: Callable[[PlacementGroup], None],
    name: str,
    lease: Lease | None = None,
) -> None:
    """Train a trial on several workers, to the end or until `log` ends it; then its slots are free.

    `log` and `on_placement` are called in this process: with metrics, and with the workers' placement group after each
    start. `name` is that of the run in Ray Train; `lease` is on the study's folder.

    Raises:
        Diverged, UserError: as for `fit`.
        SystemExit: raised by `log`, as by `ray.tune.report` in a stopped trial.
    """
    with DriverQueue({"log": log, "on_placement": on_placement}) as queue:
        senders = {"log": queue.sender("log"), "on_placement": queue.sender("on_placement", acknowledge=False)}
        _train(config, senders, name, WorkerEnvironment.capture(config.run_folder, config.data, lease))


def _train(config: Config, settings: dict[str, Any], name: str, environment: WorkerEnvironment) -> int:
    retry_storage(lambda: (config.run_folder / STATUS_FILE).unlink(missing_ok=True), config.run_folder)
    for noisy in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    ray_files = ray_folder(config.run_folder)
    settings |= {
        "config": with_absolute_paths(config),
        "threads": training_threads(config, cpus_per_worker(config) if config.scale.workers else None),
        "worker_environment": environment.send(),
    }
    trainer = ray.train.torch.TorchTrainer(
        train_loop_per_worker,
        train_loop_config=settings,
        scaling_config=_scaling(config),
        run_config=RunConfig(  # a run resumes from our own checkpoints, never from Ray's
            name=name,
            storage_path=str(ray_files),
            failure_config=FailureConfig(max_failures=config.scale.max_failures),
        ),
    )
    try:
        with _ray_train_defaults(config):
            _fit(trainer)
    except (Diverged, UserError):
        _raise_worker_error(config)
        raise
    except ray.train.TrainingFailedError as error:
        _raise_retried_error(error)
        _raise_worker_error(config)
        raise
    finally:
        shutil.rmtree(ray_files, ignore_errors=True)
    _raise_worker_error(config)
    return int(_status(config)["undelivered"])


def _scaling(config: Config) -> ScalingConfig:
    workers = config.scale.workers
    if workers == 0:
        return ScalingConfig(num_workers=0, use_gpu=config.scale.gpu)
    return ScalingConfig(
        num_workers=tuple(workers) if isinstance(workers, list) else workers,
        use_gpu=config.scale.gpu,
        resources_per_worker=worker_resources(config),
        elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
    )


@contextmanager
def _ray_train_defaults(config: Config) -> Iterator[None]:
    """Set the environment variables of Ray Train that the user has not set."""
    variables = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_S)}
    if isinstance(config.scale.workers, list):
        variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(WORKER_START_TIMEOUT_S)
    unset = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(unset)
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


def _fit(trainer: Any) -> None:
    """Run `trainer.fit()`. Ray replaces the handler of Ctrl-C, which raises KeyboardInterrupt again afterwards."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        trainer.fit()
    except SystemExit:  # raised by Ray's handler
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker: `run_worker`, then the status file.

    Ray Train starts the workers again after any error. An attempt that finds a status file ends at once: the error of
    the attempt before it would occur again.
    """
    environment = WorkerEnvironment.receive(settings["worker_environment"])
    environment.apply()
    config = parse_config(settings["config"])
    if _status(config):
        return
    device = ray.train.torch.get_device() if config.scale.gpu else torch.device("cpu")
    callbacks = _Callbacks(config, settings, environment.tracked)
    worker = callbacks.worker
    notice = PreemptionNotice(lambda: ray.train.get_preemption_info() is not None)
    context = WorkerContext(worker, device, callbacks.report, callbacks.log, environment.lease, notice.preempted)
    undelivered, delivery_s = 0, INTERRUPTED_DELIVERY_S
    try:
        with torch_threads(settings["threads"]):
            run_worker(config, context)
        delivery_s = DELIVERY_S
    except RETRIED_ERRORS:
        raise
    except (Diverged, UserError) as error:
        kind = "Diverged" if isinstance(error, Diverged) else "UserError"
        if not _status(config):  # the error of the first worker is kept
            _write_status(config, {"kind": kind, "error": str(error)})
        raise
    except StoppedTrial:
        pass
    finally:
        undelivered = callbacks.close(delivery_s)
    if worker.rank == 0:
        _write_status(config, {"undelivered": undelivered})


class StoppedTrial(Exception):
    """Ends the workers of a trial that was stopped."""


class _Callbacks:
    """Sends a worker's metrics and progress to MLflow, Ray's gauges and the driver.

    None of it goes through `ray.train.report`: Ray Train takes one report a poll, so short epochs would wait for it.
    """

    def __init__(self, config: Config, settings: Mapping[str, Any], tracked: TrackedRun | None) -> None:
        context = ray.train.get_context()
        self.worker = WorkerRank(context.get_world_rank(), context.get_world_size())
        self._settings, self._gauges = settings, Gauges(config.run_id)
        self._continues = True  # false once the trial was stopped; known on rank 0
        self._tracker: MetricLogger | None = None
        if self.worker.rank == 0:
            if tracked:
                self._tracker = MetricLogger(tracked, config.run.system_metrics)
            if "on_placement" in settings:
                settings["on_placement"](get_current_placement_group())

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        """Log to the run in MLflow, or wait until the driver has reported a trial's metrics to Ray Tune."""
        if self._tracker:
            self._tracker.log(step, metrics, timestamp_ms)
        elif "log" in self._settings:
            self._continues = self._settings["log"](step, metrics, timestamp_ms)

    def report(self, event: StepProgress | EpochEnd) -> None:
        """Show an event; raises StoppedTrial on all workers at the end of the epoch in which a trial was stopped."""
        if self.worker.rank == 0:
            self._gauges.show(event)
            if "on_event" in self._settings:
                self._settings["on_event"](event)
        end_of_trial_epoch = "log" in self._settings and isinstance(event, EpochEnd)
        if end_of_trial_epoch and not broadcast_from_rank_0(lambda: self._continues):
            raise StoppedTrial

    def close(self, timeout_s: float) -> int:
        """Wait for MLflow; returns the number of steps that it has not received."""
        return self._tracker.close(timeout_s) if self._tracker else 0


def _raise_worker_error(config: Config) -> None:
    """Raise the error in the status file, without Ray's wrapping."""
    status = _status(config)
    if "error" in status:
        raise (Diverged if status["kind"] == "Diverged" else UserError)(status["error"]) from None


def _raise_retried_error(error: Any) -> None:
    """Raise the error of `RETRIED_ERRORS` that a worker met in every attempt, without Ray's wrapping."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, RETRIED_ERRORS):
            raise cause from None


def _status(config: Config) -> dict[str, Any]:
    """How the latest attempt ended; empty while it runs."""
    return read_json(config.run_folder / STATUS_FILE, "run the same command again") or {}


def _write_status(config: Config, status: Mapping[str, Any]) -> None:
    write_json(config.run_folder / STATUS_FILE, status)
