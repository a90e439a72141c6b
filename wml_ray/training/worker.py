"""One worker from start to end: build or resume, train, keep checkpoints, test. Without Ray and MLflow."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from wml_ray.checkpoints.checkpoint import Checkpoint, DamagedCheckpoint, best_epoch
from wml_ray.checkpoints.plan import layout
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank, broadcast_from_rank_0
from wml_ray.storage.files import write_json
from wml_ray.storage.lease import Lease
from wml_ray.storage.retry import retry_storage
from wml_ray.storage.runs import RESULT
from wml_ray.training.events import EpochEnd, LogMetrics, MidEpochState, OnEvent, Preempted, StepProgress, now_ms
from wml_ray.training.memory import PeakMemory
from wml_ray.training.precision import resolve_precision
from wml_ray.training.result import log_history, summary, with_smallest_peer
from wml_ray.training.start import build_method, epoch_checkpoints, mid_epoch_checkpoints, starting_point
from wml_ray.training.teacher import check_same_teacher, load_teacher
from wml_ray.training.termination import Termination
from wml_ray.training.trainer import Trainer


@dataclass(frozen=True)
class WorkerContext:
    """One worker's rank, device and callbacks."""

    worker: WorkerRank = field(default_factory=WorkerRank)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    report: OnEvent = field(default=lambda event: None)
    """Receives the events of training, on every worker."""
    log: LogMetrics = field(default=lambda step, metrics, timestamp_ms: None)
    """Receives metrics on rank 0; after a resume, the whole history again."""
    lease: Lease | None = None
    """The lease on the run's folder, without which nothing is written."""
    preempted: Preempted | None = None
    """Returns True when the machine is about to stop: a checkpoint is then written in the middle of the epoch."""


def run_worker(config: Config, context: WorkerContext) -> dict[str, Any] | None:
    """Train from the newest checkpoint to the end; returns the result on rank 0, None elsewhere.

    SIGTERM to a training in the main thread is passed on to its handler after a checkpoint, see `Termination`.

    Raises:
        Diverged: training turned non-finite; the last good checkpoint stays.
        LeaseLost: another process has taken the run over.
        StorageUnavailable: the storage failed for ten minutes.
        UserError: the teacher cannot be used, or has changed since the run began.
    """
    with (
        closing(epoch_checkpoints(config, context.lease)) as checkpoints,
        closing(mid_epoch_checkpoints(config, context.lease)) as mid_epoch,
    ):
        return _WorkerRun(config, context, checkpoints, mid_epoch).run()


class _WorkerRun:
    """A trainer, its checkpoints, and the metadata they are written with."""

    def __init__(
        self, config: Config, context: WorkerContext, checkpoints: Checkpoints, mid_epoch: Checkpoints
    ) -> None:
        self.config, self.context, self.checkpoints, self.mid_epoch = config, context, checkpoints, mid_epoch
        self.is_first = context.worker.rank == 0
        self.memory, self.termination = PeakMemory(context.device), Termination()
        epoch, in_mid_epoch = broadcast_from_rank_0(lambda: starting_point(config, checkpoints.lease, mid_epoch))
        start = (mid_epoch if in_mid_epoch else checkpoints).load(epoch)
        dataset = load_dataset(config, context.device, start.metadata["skipped_images"])
        teacher = load_teacher(config, dataset)
        check_same_teacher(start, teacher)
        method = build_method(config, dataset.spec, start.metadata["channels"], teacher)
        precision = start.metadata.get("precision") or broadcast_from_rank_0(
            lambda: resolve_precision(config.optim.precision, context.device)
        )
        self.trainer = Trainer(config, method, dataset, context.device, context.worker, precision)
        self.trainer.load_state(start.model, start.state)
        self.metadata = {**start.metadata, "precision": precision}

    def run(self) -> dict[str, Any] | None:
        log_history(self.metadata, self._log)
        with self.termination:
            self.trainer.fit(self._on_event, self._must_stop, self._save_mid_epoch)
        self.checkpoints.wait_for_uploads()
        self._load_test_epoch()
        test = with_smallest_peer(self.trainer.evaluate("test"), "test", self.metadata["peers"])
        if not self.is_first:
            return None
        result = summary(self.config, self.trainer, self.metadata, test)
        write_json(self.config.run_folder / RESULT, result)
        self._log(self.trainer.epoch, result["final"], result["timestamp_ms"])
        return result

    def _log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        if self.is_first:
            self.context.log(step, metrics, timestamp_ms)

    def _on_event(self, event: StepProgress | EpochEnd) -> None:
        if isinstance(event, EpochEnd):
            timestamp_ms, metrics = now_ms(), with_smallest_peer(event.metrics, "val", self.metadata["peers"])
            entry = {"epoch": event.epoch, "timestamp_ms": timestamp_ms, "metrics": metrics}
            self.metadata.update(epoch=event.epoch, metrics=metrics, history=[*self.metadata["history"], entry])
            earlier_bytes = self.metadata.get("peak_memory_bytes", 0)  # of a process that this one resumes
            self.metadata["peak_memory_bytes"] = max(earlier_bytes, self.memory.measure_bytes())
            self._save(self.checkpoints, event.epoch)  # before logging: a logged epoch is never trained again
            self._log(event.epoch, metrics, timestamp_ms)
            self.termination.end()
        self.context.report(event)

    def _must_stop(self) -> bool:
        return self.termination.requested or (self.context.preempted is not None and self.context.preempted())

    def _save_mid_epoch(self, event: MidEpochState) -> None:
        self._save(self.mid_epoch, event.epoch)
        self.termination.end()

    def _save(self, checkpoints: Checkpoints, epoch: int) -> None:
        if self.is_first:
            state = self.trainer.state()
            metadata = {**self.metadata, "trainer_layout": layout(state)}
            checkpoint = Checkpoint(epoch, self.trainer.model_state(), state, metadata)
            retry_storage(lambda: checkpoints.save(checkpoint), checkpoints.folder)

    def _load_test_epoch(self) -> None:
        """Put the trainer at the epoch the test accuracy is taken from."""
        if self.config.run.test_epoch == "best":
            history = self.metadata["history"]
            best = broadcast_from_rank_0(lambda: _best_intact(self.checkpoints, history))
            if best != self.trainer.epoch:
                chosen = self.checkpoints.load(best)
                self.trainer.load_state(chosen.model, chosen.state)


def _best_intact(checkpoints: Checkpoints, history: list[dict[str, Any]]) -> int:
    """The best epoch by validation that has an intact checkpoint."""
    kept = set(checkpoints.epochs())
    while (best := best_epoch([entry for entry in history if entry["epoch"] in kept])) is not None:
        try:
            return checkpoints.load(best).epoch
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; the next best epoch is tested instead", stacklevel=2)
            kept.remove(best)
    raise DamagedCheckpoint(f"no checkpoint in {checkpoints.folder} can be read")
