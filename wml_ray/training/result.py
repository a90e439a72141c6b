"""The finished run as JSON, and the metrics it logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wml_ray.config.schema import Config
from wml_ray.training.events import LogMetrics, now_ms
from wml_ray.training.latency import LATENCY_THREADS, measure_latency
from wml_ray.training.trainer import Trainer

RESULT = "result.json"


def log_result(result: dict[str, Any], log: LogMetrics) -> None:
    """Everything a finished run logs, for a receiver that may have missed some of it."""
    log_history(result, log)
    log(result["test_epoch"], result["final"], result["timestamp_ms"])


def summary(config: Config, trainer: Trainer, plan: dict[str, Any], test: dict[str, float]) -> dict[str, Any]:
    """The finished run as JSON: each peer's size, latency, accuracy and weight; the ensembles; the history."""
    validation = plan["history"][trainer.epoch - 1]["metrics"]
    weights = trainer.weights_M.tolist()
    latencies = [measure_latency(trainer.tree.peer(index), trainer.dataset.spec) for index in range(config.num_peers)]
    peers = [
        {
            "peer": index,
            **plan["peers"][index],
            "latency_ms": latencies[index].median_ms,
            "latency_spread_ms": latencies[index].spread_ms,
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
    result["images"] = {split: len(indices) for split, indices in trainer.dataset.splits.items()}
    result |= {"ensembles": ensembles, "test_epoch": trainer.epoch, "test_rule": config.run.test_epoch}
    metrics = {f"peers/latency_ms/peer{peer['peer']}": peer["latency_ms"] for peer in peers}
    result |= {"final": test | metrics, "created_ms": plan["created_ms"], "timestamp_ms": now_ms()}
    result |= {"skipped_images": plan["skipped_images"], "latency_threads": LATENCY_THREADS}
    return result | {"history": plan["history"], "tree": plan["tree"], "device": trainer.device.type}


def with_smallest_peer(metrics: Mapping[str, float], split: str, peers: list[dict[str, Any]]) -> dict[str, float]:
    """The accuracy of the peer with the fewest MACs under a name of its own: its number depends on the ratios."""
    smallest = min(range(len(peers)), key=lambda index: (peers[index]["macs"], peers[index]["params"], index))
    return {**metrics, f"{split}/accuracy/smallest_peer": metrics[f"{split}/accuracy/peer{smallest}"]}


def log_history(record: Mapping[str, Any], log: LogMetrics) -> None:
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
