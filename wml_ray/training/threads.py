"""The number of CPU threads of a training step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wml_ray.config.schema import Config
from wml_ray.data.readers import image_resolution

# Medians of a step of the default tree (resnet20, [1, 1, 2, 4, 4]) with 1 | 2 threads on 2 cores. With the second core
# mostly idle, 8x8 images, batch 64: 56 | 79 ms. With it busy, 8x8, batch 64: 75 | 739 ms; 32x32, batch 64: 0.7 | 4.1 s;
# 64x64, batch 16: 1.2 | 4.4 s; 224x224, batch 4: 13 | 31 s, and at least 4 times the CPU time. Threads that wait for
# each other cost more than they can gain unless a step is large.
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
    if config.scale.workers == 0:
        return f"{_count(training_threads(config), 'thread')}{_reason(config)}"
    if config.scale.cpus_per_worker is not None:
        return f"{_count(config.scale.cpus_per_worker, 'thread')} a worker"
    most = training_threads(config, cores=2**10)  # the cores of a worker are known once the cluster is joined
    return f"at most {_count(most, 'thread')} a worker{_reason(config)}"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the body with `count` intra-operation threads of torch, then restore the number before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch_per_worker(config: Config) -> int:
    workers = config.scale.workers
    most = workers[1] if isinstance(workers, list) else workers
    return -(-config.data.batch_size // max(most, 1))


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reason(config: Config) -> str:
    if config.scale.cpus_per_worker is not None:
        return " (scale.cpus_per_worker)"
    side = image_resolution(config.data)
    return f" (images of {side}x{side} pixels, batch {_batch_per_worker(config)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
