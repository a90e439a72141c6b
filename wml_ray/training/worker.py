"""One worker from start to end: build or resume, train, keep checkpoints, test. No Ray and no MLflow in sight."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from wml_ray.backbones import ImageSpec, build
from wml_ray.checkpoint import Checkpoint, Checkpoints, Damaged, best_epoch
from wml_ray.config import Config, UserError
from wml_ray.costs import count_macs, count_params, layer_costs
from wml_ray.data import Dataset, Shard, load, seed_for
from wml_ray.lock import Claim
from wml_ray.loop import EpochEnd, Leaving, MidEpoch, Report, Tick, Trainer, check_shares, initial_state
from wml_ray.metrics import latency_ms
from wml_ray.pruning import apply_plan, prune
from wml_ray.storage import patiently, write_json
from wml_ray.tree import PeerTree
from wml_ray.uploads import open_checkpoints

Log = Callable[[int, Mapping[str, float], int], None]  # step, metrics, milliseconds since the epoch of Unix
T = TypeVar("T")

RESULT = "result.json"


def ignore_log(step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
    """A `Log` for those who do not listen."""


def fresh_tree(config: Config, spec: ImageSpec) -> PeerTree:
    """The unpruned tree of a config; its initial tensors follow from the seed.

    Raises:
        UserError: an unknown backbone, or sharing that does not fit its stages.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "initialisation"))
        return PeerTree(lambda: build(config.model.backbone, spec), config.model.sharing)


def prepare(config: Config, num_workers: int = 1, claim: Claim | None = None) -> Checkpoint:
    """Where the run starts: its newest intact checkpoint, else the freshly pruned tree, saved as epoch 0.

    Every worker starts from a checkpoint, so all are pruned alike and a first start is like any other. `num_workers` is
    how many there may come to be.

    Raises:
        UserError: in the backbone, the sharing, the ratios or the data, before anything is written.
    """
    with closing(_checkpoints(config, claim)) as checkpoints:
        newest = checkpoints.latest()
        if newest is None:
            dataset = load(config)
            check_shares(config, dataset, num_workers)
            newest = beginning(config, dataset)
            try:
                checkpoints.save(newest)
            except OSError as error:
                raise UserError(
                    f"run.storage_path = '{config.run.storage_path}': {config.run_folder} cannot be written "
                    f"({error.strerror}); name a folder that can"
                ) from error
            checkpoints.settle()
        return newest


def beginning(config: Config, dataset: Dataset) -> Checkpoint:
    """Epoch 0: the tree as initialised and pruned."""
    tree = fresh_tree(config, dataset.spec)
    full = family_costs(tree, dataset.spec)
    batches = dataset.saliency_batches(config.pruning.saliency_images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "saliency"))  # for dropout
        channels = prune(tree, config.pruning, dataset.spec, batches)
    plan = {
        "format": 1,
        "run_id": config.run_id,
        "config": config.model_dump(mode="json"),
        "sharing": list(tree.sharing),
        "image_spec": vars(dataset.spec),
        "normalisation": {"mean": dataset.mean, "std": dataset.std},
        "channels": channels,
        "peers": drops(full, family_costs(tree, dataset.spec)),
        "tree": {"params": count_params(tree), "macs": count_macs(tree, dataset.spec)},
        "created_ms": now_ms(),
        "epoch": 0,
        "metrics": {},
        "history": [],
    }
    return Checkpoint(0, tree.state_dict(), initial_state(tree.num_peers), plan)


def run_worker(
    config: Config,
    shard: Shard,
    device: torch.device,
    report: Report,
    log: Log,
    claim: Claim | None = None,
    leaving: Leaving | None = None,
) -> dict[str, Any] | None:
    """Train from the newest checkpoint to the end; the result on rank 0, None elsewhere.

    `report` hears every epoch on every worker. `log` receives metrics on rank 0, after a resume the whole history
    again: what it has had before is the receiver's to know. `claim` is what allows to write into the run's folder.
    When `leaving` says that the machine may soon be gone, a checkpoint is written in the middle of the epoch.

    Raises:
        Diverged: training turned non-finite; the last good checkpoint stays.
        Replaced: another process has taken the run over.
        Unanswered: the storage failed for ten minutes.
    """
    with closing(_checkpoints(config, claim)) as checkpoints, closing(_partial(config, claim)) as partial:
        return _run_worker(config, shard, device, report, log, checkpoints, partial, leaving)


def _run_worker(
    config: Config,
    shard: Shard,
    device: torch.device,
    report: Report,
    log: Log,
    checkpoints: Checkpoints,
    partial: Checkpoints,
    leaving: Leaving | None,
) -> dict[str, Any] | None:
    epoch, mid_epoch = from_rank_0(shard, lambda: _where_to_start(config, checkpoints.claim, partial))
    start = (partial if mid_epoch else checkpoints).load(epoch)
    dataset = load(config, device)
    tree = fresh_tree(config, dataset.spec)
    apply_plan(tree, start.plan["channels"])
    trainer = Trainer(config, tree, dataset, device, shard)
    trainer.load_state(start.model, start.state)
    plan = dict(start.plan)
    log_on_rank_0 = log if shard.rank == 0 else ignore_log
    _log_past(plan, log_on_rank_0)

    def on_event(event: Tick | EpochEnd) -> None:
        if isinstance(event, EpochEnd):
            timestamp_ms, metrics = now_ms(), _with_smallest_peer(event.metrics, "val", plan["peers"])
            entry = {"epoch": event.epoch, "timestamp_ms": timestamp_ms, "metrics": metrics}
            plan.update(epoch=event.epoch, metrics=metrics, history=[*plan["history"], entry])
            if shard.rank == 0:  # the checkpoint first: what is logged is then never trained again under another number
                checkpoint = Checkpoint(event.epoch, trainer.model_state(), trainer.state(), plan)
                patiently(lambda: checkpoints.save(checkpoint), checkpoints.folder)
            log_on_rank_0(event.epoch, metrics, timestamp_ms)
        report(event)

    def save(event: MidEpoch) -> None:
        if shard.rank == 0:
            checkpoint = Checkpoint(event.epoch, trainer.model_state(), trainer.state(), plan)
            patiently(lambda: partial.save(checkpoint), partial.folder)

    trainer.fit(on_event, leaving, save)
    checkpoints.settle()
    _select(config, trainer, checkpoints, plan, shard)
    test = _with_smallest_peer(trainer.evaluate("test"), "test", plan["peers"])
    if shard.rank:
        return None
    result = summary(config, trainer, plan, test)
    write_json(config.run_folder / RESULT, result)
    log(trainer.epoch, result["final"], result["timestamp_ms"])
    return result


def deliver(result: dict[str, Any], log: Log) -> None:
    """Everything a finished run logs, for a receiver that may have missed some of it."""
    _log_past(result, log)
    log(result["test_epoch"], result["final"], result["timestamp_ms"])


def summary(config: Config, trainer: Trainer, plan: dict[str, Any], test: dict[str, float]) -> dict[str, Any]:
    """The finished run as JSON: each peer's size, latency, accuracy and weight; the ensembles; the history."""
    validation = plan["history"][trainer.epoch - 1]["metrics"]
    weights = trainer.weights_M.tolist()
    peers = [
        {
            "peer": index,
            **plan["peers"][index],
            "latency_ms": latency_ms(trainer.tree.peer(index), trainer.dataset.spec),
            "validation_accuracy": validation[f"val/accuracy/peer{index}"],
            "test_accuracy": test[f"test/accuracy/peer{index}"],
            "weight": weights[index],
        }
        for index in range(config.num_peers)
    ]
    ensembles = {
        kind: {
            "validation_accuracy": validation[f"val/accuracy/ensemble_{kind}"],
            "test_accuracy": test[f"test/accuracy/ensemble_{kind}"],
        }
        for kind in ("average", "weighted")
    }
    result: dict[str, Any] = {"run_id": config.run_id, "config": config.model_dump(mode="json"), "peers": peers}
    result |= {"ensembles": ensembles, "test_epoch": trainer.epoch, "test_rule": config.run.test_epoch}
    latencies = {f"peers/latency_ms/peer{peer['peer']}": peer["latency_ms"] for peer in peers}
    result |= {"final": test | latencies, "created_ms": plan["created_ms"], "timestamp_ms": now_ms()}
    return result | {"history": plan["history"], "tree": plan["tree"], "device": trainer.device.type}


def family_costs(tree: PeerTree, spec: ImageSpec) -> list[dict[str, int]]:
    """Channels (of all layers but the head), parameters and MACs an image of each peer."""
    costs = []
    for index in range(tree.num_peers):
        peer = tree.peer(index)
        weighted = [cost for cost in layer_costs(peer, spec).values() if cost.positions]
        macs = sum(cost.macs(cost.out, cost.into) for cost in weighted)
        channels = sum(cost.out for cost in weighted[:-1])
        costs.append({"channels": channels, "params": count_params(peer), "macs": macs})
    return costs


def drops(full: list[dict[str, int]], now: list[dict[str, int]]) -> list[dict[str, float]]:
    """What each peer has and the share it lost, in channels, params and MACs."""
    return [
        {**costs, **{f"{unit}_drop": (whole[unit] - costs[unit]) / max(whole[unit], 1) for unit in whole}}
        for whole, costs in zip(full, now, strict=True)
    ]


def _with_smallest_peer(metrics: Mapping[str, float], split: str, peers: list[dict[str, Any]]) -> dict[str, float]:
    """The accuracy of the peer with the fewest MACs under a name of its own: its number depends on the ratios."""
    smallest = min(range(len(peers)), key=lambda index: (peers[index]["macs"], peers[index]["params"], index))
    return {**metrics, f"{split}/accuracy/smallest_peer": metrics[f"{split}/accuracy/peer{smallest}"]}


def _select(config: Config, trainer: Trainer, checkpoints: Checkpoints, plan: dict[str, Any], shard: Shard) -> None:
    """Put the trainer at the epoch the test accuracy is taken from."""
    if config.run.test_epoch == "best":
        best = from_rank_0(shard, lambda: _best_intact(checkpoints, plan["history"]))
        if best != trainer.epoch:
            chosen = checkpoints.load(best)
            trainer.load_state(chosen.model, chosen.state)


def _best_intact(checkpoints: Checkpoints, history: list[dict[str, Any]]) -> int:
    """The best epoch by validation whose checkpoint can be read."""
    kept = set(checkpoints.epochs())
    while (best := best_epoch([entry for entry in history if entry["epoch"] in kept])) is not None:
        try:
            return checkpoints.load(best).epoch
        except Damaged as error:
            warnings.warn(f"{error}; testing the best epoch besides it", stacklevel=2)
            kept.remove(best)
    raise Damaged(f"no checkpoint in {checkpoints.folder} can be read")


def _log_past(record: Mapping[str, Any], log: Log) -> None:
    """The sizes of the peers, and every epoch so far."""
    sizes = {
        f"peers/{unit}/peer{index}": float(peer[unit])
        for unit in ("macs", "params", "channels")
        for index, peer in enumerate(record["peers"])
    }
    sizes |= {f"peers/{unit}/tree": float(record["tree"][unit]) for unit in ("macs", "params")}
    log(0, sizes, record["created_ms"])
    for entry in record["history"]:
        log(entry["epoch"], entry["metrics"], entry["timestamp_ms"])


def _checkpoints(config: Config, claim: Claim | None) -> Checkpoints:
    return open_checkpoints(config.run_folder / "checkpoints", config.run.keep_checkpoints, claim)


def _partial(config: Config, claim: Claim | None) -> Checkpoints:
    """Of the middle of an epoch, written when the machine was about to go."""
    return open_checkpoints(config.run_folder / "checkpoints" / "partial", 1, claim)


def _where_to_start(config: Config, claim: Claim | None, partial: Checkpoints) -> tuple[int, bool]:
    """Epochs done in the newest checkpoint, and whether one of the middle of the next epoch goes on from there."""
    newest, further = prepare(config, claim=claim), partial.latest()
    return newest.epoch, further is not None and further.plan["history"] == newest.plan["history"]


def from_rank_0(shard: Shard, decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every worker."""
    if shard.world_size == 1:
        return decide()
    decided: list[Any] = [decide() if shard.rank == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    return decided[0]  # type: ignore[no-any-return]


def now_ms() -> int:
    """Milliseconds since the epoch of Unix, as MLflow counts."""
    return time.time_ns() // 1_000_000
