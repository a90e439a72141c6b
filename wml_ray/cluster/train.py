"""The same worker under Ray Train: in this process, on N workers, or on as many as there are."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup

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
from wml_ray.training.events import EpochEnd, OnEvent, StepProgress, ignore_metrics
from wml_ray.training.threads import torch_threads, training_threads
from wml_ray.training.worker import WorkerContext, run_worker

DELIVERY_S = 120.0  # how long a finished run waits for a tracking server that went away
INTERRUPTED_DELIVERY_S = 5.0  # the same after an error or Ctrl-C
OUTCOME = "outcome.json"  # how the latest attempt ended, written where the driver can read it
WORKER_START_TIMEOUT_S = (
    10  # how long an elastic run waits for places Ray takes for free: those of a lost node, for up to 20 s
)
RESIZE_INTERVAL_S = (
    30.0  # between two looks of an elastic run for nodes that came; to grow is to start the workers again
)
HEALTH_CHECK_S = 0.5  # how often Ray Train looks at its workers: so long goes unnoticed that they have ended, or died
PROGRESS_POLL_S = (
    1.0  # between two looks of the driver for progress: the workers, which may be as many as cores, wait for none
)


def fit(config: Config, tracked: TrackedRun | None, on_event: OnEvent, lease: Lease | None = None) -> int:
    """Train to the end on the cluster that was joined; returns the steps MLflow could not be told of.

    Metrics go to the MLflow run `tracked`, progress to `on_event` in this process. `lease` is on the run's folder.

    Raises:
        Diverged: training turned non-finite.
        UserError: a worker met a mistake of the user's, such as an image that cannot be read.
    """
    settings: dict[str, Any] = {"tracked": asdict(tracked) if tracked else None}
    if config.scale.workers == 0:
        return _train(config, settings | {"send": on_event}, uuid.uuid4().hex, lease)
    with DriverQueue({"event": on_event}, pause_s=PROGRESS_POLL_S) as mailbox:
        send = mailbox.sender("event", answered=False)
        return _train(config, settings | {"send": send}, uuid.uuid4().hex, lease)


class TrialListener(Protocol):
    """Hears a training on several workers that is a trial, in the process that started it.

    `log` may end the training by raising SystemExit, as `ray.tune.report` does for a stopped trial.
    """

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None: ...

    def placed(self, group: PlacementGroup) -> None:
        """The workers have taken their places; again after a restart."""


def fit_trial(config: Config, listener: TrialListener, name: str, lease: Lease | None = None) -> None:
    """Train as a trial: until the end, or until `listener` ends it; then the workers have given back what they held.

    `name` is Ray Train's for the run; `lease` is on the study's folder.

    Raises:
        Diverged, UserError: as for `fit`.
        SystemExit: as `listener` did.
    """
    with DriverQueue({"log": listener.log, "placed": listener.placed}) as mailbox:
        senders = {"log": mailbox.sender("log"), "placed": mailbox.sender("placed")}
        _train(config, senders, name, lease)


def _train(config: Config, settings: dict[str, Any], name: str, lease: Lease | None) -> int:
    retry_storage(lambda: (config.run_folder / OUTCOME).unlink(missing_ok=True), config.run_folder)
    for noisy in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    timing = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_S)}
    if isinstance(config.scale.workers, list):
        timing["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(WORKER_START_TIMEOUT_S)
    of_ray = ray_folder(config.run_folder)
    settings |= {
        "config": with_absolute_paths(config),
        "threads": training_threads(config, cpus_per_worker(config) if config.scale.workers else None),
        "worker_environment": WorkerEnvironment.capture(config.run_folder, lease),
    }
    trainer = ray.train.torch.TorchTrainer(
        train_loop_per_worker,
        train_loop_config=settings,
        scaling_config=_scaling(config),
        run_config=RunConfig(
            name=name,  # our checkpoints are what a run resumes from, never Ray's
            storage_path=str(of_ray),
            failure_config=FailureConfig(max_failures=config.scale.max_failures),
        ),
    )
    try:
        with _unless_set(timing):
            _fit(trainer)
    except (Diverged, UserError):
        _raise_what_the_worker_said(config)
        raise
    except ray.train.TrainingFailedError as error:
        _raise_what_the_storage_did(error)
        _raise_what_the_worker_said(config)
        raise
    finally:
        shutil.rmtree(of_ray, ignore_errors=True)
    _raise_what_the_worker_said(config)
    return int(_outcome(config)["undelivered"])


@contextmanager
def _unless_set(variables: dict[str, str]) -> Iterator[None]:
    """Variables of the environment for Ray, those that the user has set aside."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _fit(trainer: Any) -> None:
    """`trainer.fit()`, after which Ctrl-C is KeyboardInterrupt again: Ray puts a handler of its own in its place."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        trainer.fit()
    except SystemExit:  # what Ray's handler ends with
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def train_loop_per_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    worker_environment: WorkerEnvironment = settings["worker_environment"]
    worker_environment.apply()
    config = parse_config(settings["config"])
    outcome = config.run_folder / OUTCOME
    if _outcome(config):  # Ray started the workers again after an error that another start cannot mend
        return
    context = ray.train.get_context()
    worker = WorkerRank(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device() if config.scale.gpu else torch.device("cpu")
    tracked = settings.get("tracked")
    tracker = MetricLogger(TrackedRun(**tracked), config.run.system_metrics) if tracked and worker.rank == 0 else None
    gauges, trial_goes_on = Gauges(config.run_id), True

    def log_of_trial(step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        nonlocal trial_goes_on
        trial_goes_on = ray.get(settings["log"](step, metrics, timestamp_ms))

    def report(event: StepProgress | EpochEnd) -> None:
        # never to Ray Train, which takes one report at a look: epochs that are shorter would wait for it
        if worker.rank == 0:
            gauges.show(event)
            if "send" in settings:
                settings["send"](event)
        if (
            "log" in settings
            and isinstance(event, EpochEnd)
            and not broadcast_from_rank_0(worker, lambda: trial_goes_on)
        ):
            raise _Stopped

    if worker.rank == 0 and "placed" in settings:
        settings["placed"](get_current_placement_group())
    log = tracker.log if tracker else log_of_trial if "log" in settings else ignore_metrics
    patience_s = INTERRUPTED_DELIVERY_S
    undelivered = 0
    try:
        notices = PreemptionNotice(worker, lambda: ray.train.get_preemption_info() is not None)
        with torch_threads(settings["threads"]):
            run_worker(config, WorkerContext(worker, device, report, log, worker_environment.lease, notices.preempted))
        patience_s = DELIVERY_S
    except (LeaseLost, StorageUnavailable):
        raise  # the file is another's now, or cannot be written
    except (Diverged, UserError) as error:
        if not _outcome(config):  # the worker that saw it first says what it was
            write_json(outcome, {"kind": type(error).__name__, "error": str(error)})
        raise
    except _Stopped:
        pass
    finally:
        if tracker:
            undelivered = tracker.close(patience_s)
    if worker.rank == 0:
        write_json(outcome, {"undelivered": undelivered})


class _Stopped(Exception):
    """Nobody wants the rest of this trial."""


def _raise_what_the_worker_said(config: Config) -> None:
    """Turn an error a worker wrote down into the same error here, without Ray's layers around it."""
    said = _outcome(config)
    if "error" in said:
        raise {"Diverged": Diverged, "UserError": UserError}[said["kind"]](said["error"]) from None


def _raise_what_the_storage_did(error: Any) -> None:
    """Turn an error that a worker could not write down into the same error here."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, (LeaseLost, StorageUnavailable)):
            raise cause from None


def _outcome(config: Config) -> dict[str, Any]:
    """How the latest attempt ended; nothing while it goes on."""
    return read_json(config.run_folder / OUTCOME) or {}


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
