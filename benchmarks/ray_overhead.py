"""Images per second with Ray Train, relative to the plain loop, and with two workers relative to one."""

from __future__ import annotations

import gzip
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.training.events import EpochEnd
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.trainer import Trainer
from wml_ray.verbs.train import train

IMAGES = 2600
SPEED = "train/images_per_second"


def images_per_second(rounds: int = 2) -> dict[str, Any]:
    """Medians over the epochs of interleaved runs, with one thread per worker and in the plain loop.

    A pruned ResNet-20 of four peers on noise in Fashion-MNIST's format, 256 images a step. One thread leaves a core for
    Ray's own processes, both beside the plain loop and beside one worker.
    """
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_noise(folder / "data")
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        for turn in range(rounds):
            speeds.setdefault("plain loop", []).extend(_plain(_config(folder, turn)))
            for kind, overrides in {
                "1 worker": ["scale.workers=1"],
                "2 workers": ["scale.workers=2"],
                "2 workers, sync_batchnorm": ["scale.workers=2", "optim.sync_batchnorm=true"],
            }.items():
                config = _config(folder, turn, *overrides)
                history = train(config, lambda event: None).record["history"]
                speeds.setdefault(kind, []).extend(entry["metrics"][SPEED] for entry in history[1:])
        ray.shutdown()
    return {kind: statistics.median(values) for kind, values in speeds.items()}


def _config(folder: Path, seed: int, *overrides: str) -> Config:
    where = [f"run.storage_path={folder}/{'-'.join(overrides)}", f"data.root={folder}/data", f"seed={seed}"]
    raw: dict[str, Any] = {
        "data": {"name": "fashion_mnist", "batch_size": 256},
        "optim": {"epochs": 4},
        "wml": {"update_every": 10},
    }
    raw["scale"] = {"cpus_per_worker": 1}
    return parse_config(raw, [*where, *overrides])


def _plain(config: Config) -> list[float]:
    """Images per second of each epoch but the first, without Ray, MLflow and checkpoints."""
    torch.set_num_threads(1)
    dataset = load_dataset(config)
    start = initial_checkpoint(config, dataset)
    method = build_method(config, dataset.spec, start.metadata["channels"])
    trainer = Trainer(config, method, dataset, torch.device("cpu"))
    speeds: list[float] = []
    trainer.fit(lambda event: speeds.append(event.metrics[SPEED]) if isinstance(event, EpochEnd) else None)
    return speeds[1:]


def _write_noise(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", IMAGES), ("t10k", 100)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        header = b"".join(value.to_bytes(4, "big") for value in (0x803, count, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes(), 1))
        header = b"".join(value.to_bytes(4, "big") for value in (0x801, count))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes(), 1))
