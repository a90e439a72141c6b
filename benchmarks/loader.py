"""Images a second of the loader: shards against an image folder and a bare decoding loop; memory of many images.

.venv/bin/python benchmarks/loader.py [IMAGES] [TINY_IMAGES]
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import interleaved_medians_s
from training_step import peak_resident_bytes

from wml_ray.config.load import parse_config
from wml_ray.data.dataset import Dataset
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank
from wml_ray.verbs.shard import shard

SIDE, TINY_SIDE, BATCH = 320, 16, 32


def main(images: int, tiny_images: int) -> None:
    """Print all figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folder(root / "images", images, SIDE)
        shard(str(root / "images"), str(root / "shards"))
        for loader_workers in (1, 2):
            print(f"{loader_workers} loader workers:", rates(root, images, loader_workers))
        print("first batch, seconds:", first_batch_s(root))
        write_folder(root / "tiny", tiny_images, TINY_SIDE)
        shard(str(root / "tiny"), str(root / "tiny-shards"))
        for name, kind in (("tiny", "imagefolder"), ("tiny-shards", "shards")):
            print(f"{tiny_images:,} tiny images, {kind}: {tiny_memory_bytes(root / name, kind) / 2**20:.0f} MiB")


def write_folder(root: Path, images: int, side: int) -> None:
    """An image folder of JPEG files of smooth noise, two classes, 64 of them in val/."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (8, side // 8, side // 8, 3), np.uint8)
    encoded = [Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC) for pixels in coarse]
    for part, count in (("train", images), ("val", 64)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
        for index in range(count):
            encoded[index % 8].save(root / part / "ab"[index % 2] / f"{index:06d}.jpg", quality=90)


def dataset_of(root: Path, name: str, loader_workers: int, resolution: int = 224) -> Dataset:
    """The dataset in a folder as a run loads it."""
    data = {"batch_size": BATCH, "resolution": resolution, "flip": True, "loader_workers": loader_workers}
    return load_dataset(parse_config({"data": {"name": name, "root": str(root), **data}}))


def rates(root: Path, images: int, loader_workers: int) -> dict[str, float]:
    """Images a second of an epoch from shards, from the folder, and of processes that only decode and augment."""
    sets = {
        name: dataset_of(root / folder, name, loader_workers)
        for name, folder in (("shards", "shards"), ("imagefolder", "images"))
    }
    candidates: dict[str, Any] = {
        name: lambda dataset=dataset: [None for _ in dataset.train_batches(1, WorkerRank())]
        for name, dataset in sets.items()
    }
    files: Any = sets["imagefolder"]
    candidates["bare"] = lambda: bare_loop(files.files, files.steps_per_epoch * BATCH, loader_workers)
    seconds = interleaved_medians_s(candidates, rounds=3)
    count = sets["shards"].steps_per_epoch * BATCH
    return {name: round(count / value, 1) for name, value in seconds.items()} | {
        "shards / imagefolder": round(seconds["imagefolder"] / seconds["shards"], 3),
        "shards / bare": round(seconds["bare"] / seconds["shards"], 3),
    }


def bare_loop(files: Any, count: int, processes: int) -> None:
    """Decode and augment `count` images in forked processes, without batches, queues or copies."""
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_decode, args=(files, range(process, count, processes))) for process in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _decode(files: Any, indices: range) -> None:
    for index in indices:
        files.__getitems__([(index, (index,))])


def first_batch_s(root: Path) -> dict[str, float]:
    """Seconds from the config to the first batch, of shards and of the folder, with two loader workers."""

    def first(folder: str, name: str) -> None:
        batches = dataset_of(root / folder, name, 2).train_batches(1, WorkerRank())
        next(iter(batches))

    candidates = {"shards": lambda: first("shards", "shards"), "imagefolder": lambda: first("images", "imagefolder")}
    return {name: round(value, 2) for name, value in interleaved_medians_s(candidates, rounds=3).items()}


def tiny_memory_bytes(root: Path, name: str) -> int:
    """Bytes that loading a set and an epoch of it add to the peak memory of a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_tiny, args=(root, name, sender))
    process.start()
    grown = int(receiver.recv())
    process.join()
    return grown


def _measure_tiny(root: Path, name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    before, start_s = peak_resident_bytes(), time.monotonic()
    for _ in dataset_of(root, name, 0, resolution=8).train_batches(1, WorkerRank()):
        if time.monotonic() - start_s > 120:
            break
    sender.send(peak_resident_bytes() - before)


if __name__ == "__main__":
    main(*(int(word) for word in [*sys.argv[1:], "2048", "100000"][:2]))
