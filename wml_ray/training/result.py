"""The finished run as JSON, and the metrics it logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wml_ray.config.schema import Config
from wml_ray.storage.files import read_json
from wml_ray.storage.runs import RESULT
from wml_ray.training.evaluation import prediction_names
from wml_ray.training.events import LogMetrics, now_ms
from wml_ray.training.latency import LATENCY_THREADS, measure_latency
from wml_ray.training.trainer import Trainer

KEYS = ("run_id", "config", "peers", "history", "final", "test_epoch", "timestamp_ms")  # without which it is damaged


def stored_result(config: Config) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    return read_result(config.run_folder / RESULT)


def read_result(path: Path) -> dict[str, Any] | None:
    """The result in a file, or None if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    return read_json(path, "delete it: the run then ends anew from its last checkpoint", KEYS)


def log_result(result: dict[str, Any], log: LogMetrics) -> None:
    """Log the sizes, every epoch and the final metrics of a finished run, for a receiver that missed some of them."""
    log_history(result, log)
    log(result["test_epoch"], result["final"], result["timestamp_ms"])


def summary(config: Config, trainer: Trainer, metadata: dict[str, Any], test: dict[str, float]) -> dict[str, Any]:
    """The finished run as JSON: size, latency and accuracy of each peer (and weight, where the method has weights), the
    predictions, the cost of the training, and the history.
    """
    validation = metadata["history"][trainer.epoch - 1]["metrics"]
    latencies = [measure_latency(trainer.tree.peer(index), trainer.dataset.spec) for index in range(config.num_peers)]
    peers = [
        {
            "peer": index,
            **metadata["peers"][index],
            "latency_ms": latencies[index].median_ms,
            "latency_spread_ms": latencies[index].spread_ms,
            **_accuracies(f"peer{index}", validation, test),
        }
        for index in range(config.num_peers)
    ]
    for index, peer in enumerate(peers):
        if (weight := validation.get(f"weights/peer{index}")) is not None:
            peer["weight"] = weight
    names = prediction_names(config.method.name, config.num_peers)
    cost = {"seconds": _training_seconds(config, trainer, metadata), "peak_memory_bytes": metadata["peak_memory_bytes"]}
    metrics = {f"peers/latency_ms/peer{peer['peer']}": peer["latency_ms"] for peer in peers}
    metrics |= {f"train/{name}": float(value) for name, value in cost.items()}
    return {
        "run_id": config.run_id,
        "config": config.dump(),
        "peers": peers,
        "images": {split: len(indices) for split, indices in trainer.dataset.splits.items()},
        "predictions": {name: _accuracies(name, validation, test) for name in names},
        "selects": metadata["selects"],
        "cost": cost,
        "test_epoch": trainer.epoch,
        "test_rule": config.run.test_epoch,
        "skipped_images": metadata["skipped_images"],
        "latency_threads": LATENCY_THREADS,
        "final": test | metrics,
        "created_ms": metadata["created_ms"],
        "timestamp_ms": now_ms(),
        "history": metadata["history"],
        "tree": metadata["tree"],
        "device": trainer.device.type,
        "precision": trainer.precision,
    }


def _training_seconds(config: Config, trainer: Trainer, metadata: Mapping[str, Any]) -> float:
    """Seconds of the training steps of all epochs, without evaluation and checkpoints; also of a resumed run."""
    images = trainer.dataset.steps_per_epoch * config.data.batch_size
    return sum(images / float(entry["metrics"]["train/images_per_second"]) for entry in metadata["history"])


def _accuracies(name: str, validation: Mapping[str, float], test: Mapping[str, float]) -> dict[str, float]:
    return {
        "validation_accuracy": validation[f"val/accuracy/{name}"],
        "test_accuracy": test[f"test/accuracy/{name}"],
    }


def with_smallest_peer(metrics: Mapping[str, float], split: str, peers: list[dict[str, Any]]) -> dict[str, float]:
    """`metrics` with the accuracy of the peer with the fewest MACs added as `smallest_peer`."""
    smallest = min(range(len(peers)), key=lambda index: (peers[index]["macs"], peers[index]["params"], index))
    return {**metrics, f"{split}/accuracy/smallest_peer": metrics[f"{split}/accuracy/peer{smallest}"]}


def log_history(record: Mapping[str, Any], log: LogMetrics) -> None:
    """Log the sizes of the peers and every epoch so far."""
    sizes = {
        f"peers/{unit}/peer{index}": float(peer[unit])
        for unit in ("macs", "params", "channels")
        for index, peer in enumerate(record["peers"])
    }
    sizes |= {f"peers/{unit}/tree": float(record["tree"][unit]) for unit in ("macs", "params")}
    log(0, sizes, record["created_ms"])
    for entry in record["history"]:
        log(entry["epoch"], entry["metrics"], entry["timestamp_ms"])
