"""The number of CPU threads of a training step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from wml_ray.config.schema import Config
from wml_ray.data.readers import image_resolution

# Medians of a step of the default tree (resnet20, [1, 1, 2, 4, 4]) on 2 cores. At load 3, 8x8 images at batch 64 took
# 56 ms with one thread and 79 ms with two. On a busy machine two threads were 2.5 to 23 times slower than one.
PIXELS_PER_THREAD = 2**17  # of a batch


def choose_threads(resolution: int, batch_per_worker: int, cores: int) -> int:
    """Threads for training steps on `batch_per_worker` images of `resolution` pixels a side, at most `cores`."""
    return max(1, min(cores, batch_per_worker * resolution**2 // PIXELS_PER_THREAD))


def training_threads(config: Config, cores: int | None = None) -> int:
    """Threads of a training worker on `cores` cores; None counts the cores that this process may use.

    scale.cpus_per_worker is used if set.
    """
    if config.scale.cpus_per_worker is not None:
        return config.scale.cpus_per_worker
    return choose_threads(image_resolution(config.data), _batch_per_worker(config), cores or _available_cores())


def describe_threads(config: Config) -> str:
    """The number of threads and its reason in words, for the first line of a run."""
    on_workers = config.scale.workers != 0
    at_most, reason = "", "scale.cpus_per_worker"
    if config.scale.cpus_per_worker is None:
        side = image_resolution(config.data)
        at_most = "at most " if on_workers else ""
        reason = f"images of {side}x{side} pixels, batch {_batch_per_worker(config)}"
    count = training_threads(config, cores=2**10 if on_workers else None)  # a worker's cores are known on the cluster
    return f"{at_most}{count} thread{'s' * (count != 1)}{' a worker' * on_workers} ({reason})"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body with `count` intra-operation threads of torch, then restore the number before."""
    import torch  # here, so that the first line of a run does not wait for it

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch_per_worker(config: Config) -> int:
    return -(-config.data.batch_size // max(config.scale.worker_range[1], 1))


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
