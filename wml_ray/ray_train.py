"""The same worker under Ray Train: in this process, on N workers, or on as many as there are."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig

from wml_ray.checkpoint import write_json
from wml_ray.config import Config, UserError, parse
from wml_ray.data import Shard
from wml_ray.loop import Diverged, EpochEnd, Report, Tick
from wml_ray.session import Log, ignore_log, run_worker
from wml_ray.tracking import TrackedRun, Tracker

DELIVERY_S = 60.0  # how long a finished run waits for a tracking server that went away
INTERRUPTED_DELIVERY_S = 5.0  # the same after an error or Ctrl-C
LAST_LETTERS_S = 60.0  # a trial's history is taken by Ray Tune epoch by epoch
OUTCOME = "outcome.json"  # how the latest attempt ended, written where the driver can read it
POLL_S = 1.0  # every look takes time from the workers, of which there may be as many as cores


def start(config: Config) -> None:
    """Join the cluster, or start one on this machine, and see that it has what the run needs.

    Raises:
        UserError: more workers or GPUs than there are.
    """
    if config.scale.workers == 0:
        if config.scale.gpu and not torch.cuda.is_available():
            raise UserError("scale.gpu = true but this machine has no CUDA GPU; set scale.gpu=false")
        return
    join_cluster()
    resources = ray.cluster_resources()
    fewest = worker_range(config)[0]
    gpus = int(resources.get("GPU", 0))
    if config.scale.gpu and gpus < fewest:
        raise UserError(
            f"scale.gpu = true with scale.workers = {config.scale.workers} needs {fewest} GPUs; this cluster has "
            f"{gpus}; use fewer workers, or scale.gpu=false"
        )
    each, nodes = _cpus_per_worker(config), _cpus_of_nodes()
    if sum(cpus // each for cpus in nodes) < fewest:
        raise UserError(
            f"scale.workers = {config.scale.workers} with {each} CPU cores each do not fit: this cluster has "
            f"{sum(nodes)} cores on {len(nodes)} nodes; use fewer workers or a smaller scale.cpus_per_worker"
        )


def join_cluster(verbose: bool = False) -> None:
    """Raises:
    UserError: the cluster does not take us in.
    """
    if ray.is_initialized():
        return
    try:
        # "local": Ray would else look for a cluster that ran here last, and wait for one that was killed
        ray.init(
            os.environ.get("RAY_ADDRESS") or "local",
            logging_level=logging.INFO if verbose else logging.ERROR,
            log_to_driver=verbose,
            # without a dashboard Ray frees the workers of a stopped multi-worker trial only when the job ends
            include_dashboard=None if os.environ.get("RAY_ADDRESS") else True,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "of this machine")
        raise UserError(
            f"RAY_ADDRESS: the Ray cluster {address} does not take us in ({' '.join(str(error).split())[:200]}); check "
            "the address, and with token authentication set RAY_AUTH_MODE=token and copy ~/.ray/auth_token here"
        ) from None


def fit(
    config: Config, tracked: TrackedRun | None, on_event: Report, log: Log | None = None, name: str | None = None
) -> int:
    """Train to the end on the cluster `start` has joined; returns the steps MLflow could not be told of.

    Metrics go to the MLflow run `tracked`, or are handed to `log` in this process. `name` is Ray Train's for the run.

    Raises:
        Diverged: training turned non-finite.
        UserError: a worker met a mistake of the user's, such as an image that cannot be read.
    """
    (config.run_folder / OUTCOME).unlink(missing_ok=True)
    for noisy in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    mailbox = _Mailbox({"event": on_event, "log": log or ignore_log}) if config.scale.workers else None
    ray_folder = config.run_folder.resolve() / ".ray"
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "config": _with_absolute_paths(config),
            "tracked": asdict(tracked) if tracked else None,
            "send": mailbox.sender("event") if mailbox else on_event,
            "log": mailbox.sender("log") if mailbox and log else None,
            "threads": _cpus_per_worker(config) if config.scale.workers else config.scale.cpus_per_worker,
            "import_path": [path for path in sys.path if path],  # where the user's own backbone may lie
        },
        scaling_config=_scaling(config),
        run_config=RunConfig(
            name=name or uuid.uuid4().hex,  # our checkpoints are what a run resumes from, never Ray's
            storage_path=str(ray_folder),
            failure_config=FailureConfig(max_failures=config.scale.max_failures),
        ),
    )
    try:
        _fit(trainer)
    except (Diverged, UserError, ray.train.TrainingFailedError):
        _raise_what_the_worker_said(config)
        raise
    finally:
        if mailbox:
            mailbox.close()
        shutil.rmtree(ray_folder, ignore_errors=True)
    _raise_what_the_worker_said(config)
    return int(json.loads((config.run_folder / OUTCOME).read_text())["undelivered"])


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


def _worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    config = parse(settings["config"])
    sys.path.extend(path for path in settings["import_path"] if path not in sys.path)
    outcome = config.run_folder / OUTCOME
    if outcome.exists():  # Ray started the workers again after an error that another start cannot mend
        return
    context = ray.train.get_context()
    shard = Shard(context.get_world_rank(), context.get_world_size())
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = ray.train.torch.get_device() if config.scale.gpu else torch.device("cpu")
    tracked, send = settings["tracked"], settings["send"]
    tracker = Tracker(TrackedRun(**tracked), config.run.system_metrics) if tracked and shard.rank == 0 else None
    log = tracker.log if tracker else settings["log"] or ignore_log

    def report(event: Tick | EpochEnd) -> None:
        if shard.rank == 0:
            send(event)
        if isinstance(event, EpochEnd):
            ray.train.report({"epoch": event.epoch, **event.metrics})

    patience_s = INTERRUPTED_DELIVERY_S
    undelivered = 0
    try:
        run_worker(config, shard, device, report, log)
        patience_s = DELIVERY_S
    except (Diverged, UserError) as error:
        if not outcome.exists():  # the worker that saw it first says what it was
            write_json(outcome, {"kind": type(error).__name__, "error": str(error)})
        raise
    finally:
        if tracker:
            undelivered = tracker.close(patience_s)
    if shard.rank == 0:
        write_json(outcome, {"undelivered": undelivered})


def _raise_what_the_worker_said(config: Config) -> None:
    """Turn an error a worker wrote down into the same error here, without Ray's layers around it."""
    outcome = config.run_folder / OUTCOME
    said = json.loads(outcome.read_text()) if outcome.exists() else {}
    if "error" in said:
        raise {"Diverged": Diverged, "UserError": UserError}[said["kind"]](said["error"]) from None


class _Mailbox:
    """Carries calls from rank 0 to this process, which has no other way to hear of progress."""

    def __init__(self, receivers: Mapping[str, Callable[..., None]]) -> None:
        self.actor = ray.remote(num_cpus=0)(_Letters).remote()
        self._receivers = receivers
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def sender(self, receiver: str) -> _Sender:
        """A stand-in for `receivers[receiver]` that works on any node."""
        return _Sender(self.actor, receiver)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(LAST_LETTERS_S)
        ray.kill(self.actor)

    def _poll(self) -> None:
        last = False
        while not last:
            last = self._closing.wait(POLL_S)
            for receiver, arguments in ray.get(self.actor.take.remote()):
                self._receivers[receiver](*arguments)


class _Letters:
    def __init__(self) -> None:
        self.letters: list[tuple[str, tuple[Any, ...]]] = []

    def put(self, receiver: str, arguments: tuple[Any, ...]) -> None:
        self.letters.append((receiver, arguments))

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        taken, self.letters = self.letters, []
        return taken


class _Sender:
    def __init__(self, actor: Any, receiver: str) -> None:
        self.actor, self.receiver = actor, receiver

    def __call__(self, *arguments: Any) -> None:
        self.actor.put.remote(self.receiver, arguments)


def _scaling(config: Config) -> ScalingConfig:
    workers = config.scale.workers
    if workers == 0:
        return ScalingConfig(num_workers=0, use_gpu=config.scale.gpu)
    resources = {"CPU": float(_cpus_per_worker(config))}
    if config.scale.gpu:
        resources["GPU"] = 1.0
    return ScalingConfig(
        num_workers=tuple(workers) if isinstance(workers, list) else workers,
        use_gpu=config.scale.gpu,
        resources_per_worker=resources,
    )


def _with_absolute_paths(config: Config) -> dict[str, Any]:
    """Settings for a worker, whose working directory is one that Ray made."""
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(Path(config.run.storage_path).resolve())
    raw["data"]["root"] = str(Path(config.data.root).resolve())
    return raw


def worker_range(config: Config) -> tuple[int, int]:
    workers = config.scale.workers
    return (workers[0], workers[1]) if isinstance(workers, list) else (workers, workers)


def _cpus_per_worker(config: Config) -> int:
    if config.scale.cpus_per_worker is not None:
        return config.scale.cpus_per_worker
    nodes = _cpus_of_nodes()
    return max(1, min(sum(nodes) // worker_range(config)[1], max(nodes)))


def resources_of_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _cpus_of_nodes() -> list[int]:
    return [int(resources.get("CPU", 0)) for resources in resources_of_nodes()]
