"""The same worker under Ray Train: in this process, on N workers, or on as many as there are."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.util import get_current_placement_group
from ray.util.placement_group import PlacementGroup

from wml_ray import storage, tracking
from wml_ray.config import Config, UserError, parse, place
from wml_ray.data import Shard
from wml_ray.lock import Claim, Replaced
from wml_ray.loop import Diverged, EpochEnd, Report, Tick
from wml_ray.ray_mailbox import Mailbox
from wml_ray.ray_metrics import Gauges
from wml_ray.session import from_rank_0, ignore_log, run_worker
from wml_ray.storage import patiently, read_json, write_json
from wml_ray.tracking import TrackedRun, Tracker

DELIVERY_S = 120.0  # how long a finished run waits for a tracking server that went away
INTERRUPTED_DELIVERY_S = 5.0  # the same after an error or Ctrl-C
BETWEEN_CHECKPOINTS_S = 10.0  # while a node is about to be taken away
OUTCOME = "outcome.json"  # how the latest attempt ended, written where the driver can read it
ROOM_S = 10  # how long an elastic run waits for places Ray takes for free: those of a lost node, for up to 20 s
GROW_S = 30.0  # between two looks of an elastic run for nodes that came; to grow is to start the workers again
LOOK_S = 0.5  # how often Ray Train looks at its workers: so long goes unnoticed that they have ended, or died
POLL_S = 1.0  # between two looks of the driver for progress: the workers, which may be as many as cores, wait for none


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
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "of this machine")
        raise UserError(
            f"RAY_ADDRESS: the Ray cluster {address} does not take us in ({' '.join(str(error).split())[:200]}); check "
            "the address, and with token authentication set RAY_AUTH_MODE=token and copy ~/.ray/auth_token here"
        ) from None


def fit(config: Config, tracked: TrackedRun | None, on_event: Report, claim: Claim | None = None) -> int:
    """Train to the end on the cluster that was joined; returns the steps MLflow could not be told of.

    Metrics go to the MLflow run `tracked`, progress to `on_event` in this process. `claim` is on the run's folder.

    Raises:
        Diverged: training turned non-finite.
        UserError: a worker met a mistake of the user's, such as an image that cannot be read.
    """
    settings: dict[str, Any] = {"tracked": asdict(tracked) if tracked else None}
    if config.scale.workers == 0:
        return _train(config, settings | {"send": on_event}, uuid.uuid4().hex, claim)
    with Mailbox({"event": on_event}, pause_s=POLL_S) as mailbox:
        send = mailbox.sender("event", answered=False)
        return _train(config, settings | {"send": send}, uuid.uuid4().hex, claim)


class TrialListener(Protocol):
    """Hears a training on several workers that is a trial, in the process that started it.

    `log` may end the training by raising SystemExit, as `ray.tune.report` does for a stopped trial.
    """

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None: ...

    def placed(self, group: PlacementGroup) -> None:
        """The workers have taken their places; again after a restart."""


def fit_trial(config: Config, listener: TrialListener, name: str, claim: Claim | None = None) -> None:
    """Train as a trial: until the end, or until `listener` ends it; then the workers have given back what they held.

    `name` is Ray Train's for the run; `claim` is on the study's folder.

    Raises:
        Diverged, UserError: as for `fit`.
        SystemExit: as `listener` did.
    """
    with Mailbox({"log": listener.log, "placed": listener.placed}) as mailbox:
        senders = {"log": mailbox.sender("log"), "placed": mailbox.sender("placed")}
        _train(config, senders, name, claim)


@dataclass(frozen=True)
class Surroundings:
    """What a worker, perhaps on another node, takes over from the process that started it."""

    import_path: list[str]  # where the user's own backbone may lie
    environment: dict[str, str] = field(repr=False)  # secrets among it
    claim: Claim | None

    @classmethod
    def here(cls, folder: Path, claim: Claim | None) -> Surroundings:
        """Of this process, for a worker that writes into `folder`."""
        of_storage = storage.environment() if storage.is_remote(folder) else {}
        return cls([path for path in sys.path if path], tracking.environment() | of_storage, claim)

    def take(self) -> None:
        sys.path.extend(path for path in self.import_path if path not in sys.path)
        os.environ.update(self.environment)


def ray_folder(folder: Path) -> Path:
    """Where Ray may keep what nobody reads: among a run's files, or on each node if those are in remote storage."""
    if storage.is_remote(folder):
        return Path(tempfile.gettempdir()) / f"wml_ray-{uuid.uuid4().hex}"
    return folder.resolve() / ".ray"


def _train(config: Config, settings: dict[str, Any], name: str, claim: Claim | None) -> int:
    patiently(lambda: (config.run_folder / OUTCOME).unlink(missing_ok=True), config.run_folder)
    for noisy in ("ray.train", "ray.data", "ray.tune"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    timing = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(LOOK_S)}
    if isinstance(config.scale.workers, list):
        timing["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(ROOM_S)
    of_ray = ray_folder(config.run_folder)
    settings |= {
        "config": with_absolute_paths(config),
        "threads": _cpus_per_worker(config) if config.scale.workers else config.scale.cpus_per_worker,
        "surroundings": Surroundings.here(config.run_folder, claim),
    }
    trainer = ray.train.torch.TorchTrainer(
        _worker,
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


def _worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    surroundings: Surroundings = settings["surroundings"]
    surroundings.take()
    config = parse(settings["config"])
    outcome = config.run_folder / OUTCOME
    if _outcome(config):  # Ray started the workers again after an error that another start cannot mend
        return
    context = ray.train.get_context()
    shard = Shard(context.get_world_rank(), context.get_world_size())
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = ray.train.torch.get_device() if config.scale.gpu else torch.device("cpu")
    tracked = settings.get("tracked")
    tracker = Tracker(TrackedRun(**tracked), config.run.system_metrics) if tracked and shard.rank == 0 else None
    gauges, trial_goes_on = Gauges(config.run_id), True

    def log_of_trial(step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        nonlocal trial_goes_on
        trial_goes_on = ray.get(settings["log"](step, metrics, timestamp_ms))

    def report(event: Tick | EpochEnd) -> None:
        # never to Ray Train, which takes one report at a look: epochs that are shorter would wait for it
        if shard.rank == 0:
            gauges.show(event)
            if "send" in settings:
                settings["send"](event)
        if "log" in settings and isinstance(event, EpochEnd) and not from_rank_0(shard, lambda: trial_goes_on):
            raise _Stopped

    if shard.rank == 0 and "placed" in settings:
        settings["placed"](get_current_placement_group())
    log = tracker.log if tracker else log_of_trial if "log" in settings else ignore_log
    patience_s = INTERRUPTED_DELIVERY_S
    undelivered = 0
    try:
        notices = Notices(shard, lambda: ray.train.get_preemption_info() is not None)
        run_worker(config, shard, device, report, log, surroundings.claim, notices.leaving)
        patience_s = DELIVERY_S
    except (Replaced, storage.Unanswered):
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
    if shard.rank == 0:
        write_json(outcome, {"undelivered": undelivered})


class Notices:
    """What is heard of nodes that are about to be taken away: `announced` says whether one of this training's is."""

    def __init__(self, shard: Shard, announced: Callable[[], bool]) -> None:
        self._shard, self._announced, self._last_s = shard, announced, -math.inf

    def leaving(self) -> bool:
        """Whether a node is to go, and it is time for another checkpoint; the same on all workers."""
        if not self._announced():
            return False
        if not from_rank_0(self._shard, lambda: time.monotonic() - self._last_s > BETWEEN_CHECKPOINTS_S):
            return False
        self._last_s = time.monotonic()
        return True


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
        if isinstance(cause, (Replaced, storage.Unanswered)):
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
        elastic_resize_monitor_interval_s=GROW_S,
    )


def with_absolute_paths(config: Config) -> dict[str, Any]:
    """Settings for a worker, whose working directory is one that Ray made."""
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(place(config.run.storage_path).resolve())
    raw["data"]["root"] = str(Path(config.data.root).resolve())
    return raw


def worker_range(config: Config) -> tuple[int, int]:
    workers = config.scale.workers
    return (workers[0], workers[1]) if isinstance(workers, list) else (workers, workers)


def worker_resources(config: Config) -> dict[str, float]:
    """What each worker of a run takes of a node."""
    return {"CPU": float(_cpus_per_worker(config)), **({"GPU": 1.0} if config.scale.gpu else {})}


def _cpus_per_worker(config: Config) -> int:
    if config.scale.cpus_per_worker is not None:
        return config.scale.cpus_per_worker
    nodes = _cpus_of_nodes()
    return max(1, min(sum(nodes) // worker_range(config)[1], max(nodes)))


def places(wanted: Mapping[str, float]) -> int:
    """Workers that fit the nodes there are, if each takes these resources of one node."""
    return sum(places_of(node, wanted) for node in _resources_of_nodes())


def places_of(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """Workers that fit one node of these resources."""
    return min(int(dict(node).get(name, 0) // amount) for name, amount in wanted.items())


def _resources_of_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _cpus_of_nodes() -> list[int]:
    return [int(resources.get("CPU", 0)) for resources in _resources_of_nodes()]
