from itertools import count

import torch
from torch import nn

from wml_ray.networks.spec import ImageSpec
from wml_ray.training import latency
from wml_ray.training.latency import measure_latency
from wml_ray.training.threads import torch_threads

SPEC = ImageSpec(1, 8, 10)


class Slow(nn.Module):
    """Advances the clock of `latency` by the next of `times_s`, the last of them for ever, and records its calls."""

    def __init__(self, monkeypatch, *times_s):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.now_s, self.times_s, self.calls = 0.0, times_s, []
        self.numbers = count()
        monkeypatch.setattr(latency.time, "perf_counter", lambda: self.now_s)

    def forward(self, image):
        self.now_s += self.times_s[min(next(self.numbers), len(self.times_s) - 1)]
        self.calls.append((torch.get_num_threads(), self.training, tuple(image.shape)))
        return image


def test_single_images_are_timed_on_one_thread_in_eval_mode(monkeypatch):
    network = Slow(monkeypatch, 0.001)
    with torch_threads(2):
        measure_latency(network, SPEC)
        assert torch.get_num_threads() == 2
    assert set(network.calls) == {(1, False, (1, 1, 8, 8))}
    assert network.training


def test_slow_first_calls_and_outliers_do_not_count(monkeypatch):
    network = Slow(monkeypatch, *[5.0] * 3, *[0.002] * 50, 0.3, 0.002)
    measured = measure_latency(network, SPEC)
    assert abs(measured.median_ms - 2.0) < 1e-6
    assert measured.spread_ms < 1e-6


def test_the_spread_is_the_range_from_the_10th_to_the_90th_percentile(monkeypatch):
    ramp = [0.001 * step for step in range(1, 101)]
    monkeypatch.setattr(latency, "REPEATS_S", 100.0)
    measured = measure_latency(Slow(monkeypatch, *[0.001] * latency.WARMUP, *ramp), SPEC)
    assert abs(measured.median_ms - 50.5) < 1e-6
    assert abs(measured.spread_ms - 79.2) < 1e-6


def test_a_slow_network_is_measured_in_bounded_time(monkeypatch):
    network = Slow(monkeypatch, 1.0)
    measure_latency(network, SPEC)
    assert network.now_s <= 6.0
