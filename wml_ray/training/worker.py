"""One worker from start to end: build or resume, train, keep checkpoints, test. No Ray and no MLflow in sight."""

from __future__ import annotations

import warnings
from contextlib import closing
from typing import Any

import torch

from wml_ray.checkpoints.checkpoint import Checkpoint, DamagedCheckpoint, best_epoch
from wml_ray.checkpoints.load import build_tree
from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank, broadcast_from_rank_0
from wml_ray.pruning.prune import apply_channel_widths
from wml_ray.storage.files import write_json
from wml_ray.storage.lease import Lease
from wml_ray.storage.retry import retry_storage
from wml_ray.training.events import (
    EpochEnd,
    LogMetrics,
    MidEpochState,
    OnEvent,
    Preempted,
    StepProgress,
    ignore_metrics,
    now_ms,
)
from wml_ray.training.result import RESULT, log_history, summary, with_smallest_peer
from wml_ray.training.start import epoch_checkpoints, mid_epoch_checkpoints, starting_point
from wml_ray.training.trainer import Trainer


def run_worker(
    config: Config,
    worker: WorkerRank,
    device: torch.device,
    report: OnEvent,
    log: LogMetrics,
    lease: Lease | None = None,
    preempted: Preempted | None = None,
) -> dict[str, Any] | None:
    """Train from the newest checkpoint to the end; the result on rank 0, None elsewhere.

    `report` hears every epoch on every worker. `log` receives metrics on rank 0, after a resume the whole history
    again: what it has had before is the receiver's to know. `lease` is what allows to write into the run's folder.
    When `preempted` says that the machine may soon be gone, a checkpoint is written in the middle of the epoch.

    Raises:
        Diverged: training turned non-finite; the last good checkpoint stays.
        LeaseLost: another process has taken the run over.
        StorageUnavailable: the storage failed for ten minutes.
    """
    with (
        closing(epoch_checkpoints(config, lease)) as checkpoints,
        closing(mid_epoch_checkpoints(config, lease)) as partial,
    ):
        return _run_worker(config, worker, device, report, log, checkpoints, partial, preempted)


def _run_worker(
    config: Config,
    worker: WorkerRank,
    device: torch.device,
    report: OnEvent,
    log: LogMetrics,
    checkpoints: Checkpoints,
    partial: Checkpoints,
    preempted: Preempted | None,
) -> dict[str, Any] | None:
    epoch, mid_epoch = broadcast_from_rank_0(worker, lambda: starting_point(config, checkpoints.lease, partial))
    start = (partial if mid_epoch else checkpoints).load(epoch)
    dataset = load_dataset(config, device, start.metadata["skipped_images"])
    tree = build_tree(config, dataset.spec)
    apply_channel_widths(tree, start.metadata["channels"])
    trainer = Trainer(config, tree, dataset, device, worker)
    trainer.load_state(start.model, start.state)
    plan = dict(start.metadata)
    log_on_rank_0 = log if worker.rank == 0 else ignore_metrics
    log_history(plan, log_on_rank_0)

    def on_event(event: StepProgress | EpochEnd) -> None:
        if isinstance(event, EpochEnd):
            timestamp_ms, metrics = now_ms(), with_smallest_peer(event.metrics, "val", plan["peers"])
            entry = {"epoch": event.epoch, "timestamp_ms": timestamp_ms, "metrics": metrics}
            plan.update(epoch=event.epoch, metrics=metrics, history=[*plan["history"], entry])
            if (
                worker.rank == 0
            ):  # the checkpoint first: what is logged is then never trained again under another number
                checkpoint = Checkpoint(event.epoch, trainer.model_state(), trainer.state(), plan)
                retry_storage(lambda: checkpoints.save(checkpoint), checkpoints.folder)
            log_on_rank_0(event.epoch, metrics, timestamp_ms)
        report(event)

    def save(event: MidEpochState) -> None:
        if worker.rank == 0:
            checkpoint = Checkpoint(event.epoch, trainer.model_state(), trainer.state(), plan)
            retry_storage(lambda: partial.save(checkpoint), partial.folder)

    trainer.fit(on_event, preempted, save)
    checkpoints.wait_for_uploads()
    _select(config, trainer, checkpoints, plan, worker)
    test = with_smallest_peer(trainer.evaluate("test"), "test", plan["peers"])
    if worker.rank:
        return None
    result = summary(config, trainer, plan, test)
    write_json(config.run_folder / RESULT, result)
    log(trainer.epoch, result["final"], result["timestamp_ms"])
    return result


def _select(
    config: Config, trainer: Trainer, checkpoints: Checkpoints, plan: dict[str, Any], worker: WorkerRank
) -> None:
    """Put the trainer at the epoch the test accuracy is taken from."""
    if config.run.test_epoch == "best":
        best = broadcast_from_rank_0(worker, lambda: _best_intact(checkpoints, plan["history"]))
        if best != trainer.epoch:
            chosen = checkpoints.load(best)
            trainer.load_state(chosen.model, chosen.state)


def _best_intact(checkpoints: Checkpoints, history: list[dict[str, Any]]) -> int:
    """The best epoch by validation whose checkpoint can be read."""
    kept = set(checkpoints.epochs())
    while (best := best_epoch([entry for entry in history if entry["epoch"] in kept])) is not None:
        try:
            return checkpoints.load(best).epoch
        except DamagedCheckpoint as error:
            warnings.warn(f"{error}; testing the best epoch besides it", stacklevel=2)
            kept.remove(best)
    raise DamagedCheckpoint(f"no checkpoint in {checkpoints.folder} can be read")
