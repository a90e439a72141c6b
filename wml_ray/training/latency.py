"""The time of repeated calls, and the latency of one network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from wml_ray.networks.costs import example
from wml_ray.networks.peer_tree import in_mode
from wml_ray.networks.spec import ImageSpec
from wml_ray.training.threads import torch_threads

LATENCY_THREADS = 1  # with more threads on a busy machine, 2 ms became 38 ms
WARMUP, REPEATS = 5, 100  # at most so many calls
WARMUP_S, REPEATS_S = 0.5, 2.0  # at most so long, three calls at least


@dataclass(frozen=True)
class Latency:
    """Time of one image through a network: median of the calls, and the range from their 10th to 90th percentile."""

    median_ms: float
    spread_ms: float


@torch.no_grad()
def measure_latency(network: nn.Module, spec: ImageSpec) -> Latency:
    """Time single images through `network` in eval mode, on its device and with one CPU thread, after a warm-up."""
    image = example(network, spec)
    with in_mode(network, training=False), torch_threads(LATENCY_THREADS):
        time_calls(lambda: network(image), image.device, WARMUP, WARMUP_S)
        times_ms = 1000 * np.array(time_calls(lambda: network(image), image.device, REPEATS, REPEATS_S))
    low, median, high = np.percentile(times_ms, [10, 50, 90]).tolist()
    return Latency(median, high - low)


def time_calls(call: Callable[[], object], device: torch.device, repeats: int, limit_s: float) -> list[float]:
    """Seconds of each of `repeats` calls, of fewer where they take longer than `limit_s` together; three at least."""
    times_s: list[float] = []
    while len(times_s) < 3 or (len(times_s) < repeats and sum(times_s) < limit_s):
        start_s = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - start_s)
    return times_s
