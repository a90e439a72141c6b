"""A run's metrics as Ray metrics, for its dashboard and Prometheus."""

from __future__ import annotations

import re

import ray
from ray.util.metrics import Gauge

from wml_ray.training.events import EpochEnd, StepProgress

_MODEL = re.compile(r"(.+)/(peer\d+|tree|(?<=accuracy/)\w+)")


class Gauges:
    """`val/accuracy/peer0` of a run becomes `ray_wml_val_accuracy{run="...", model="peer0"}`, with its latest value."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}

    def show(self, event: StepProgress | EpochEnd) -> None:
        """Set the gauges to an epoch's metrics. Does nothing without a cluster."""
        if not isinstance(event, EpochEnd) or not ray.is_initialized():
            return
        for name, value in {"epoch": float(event.epoch), **event.metrics}.items():
            match = _MODEL.fullmatch(name)
            self._gauge(match[1] if match else name).set(value, {"run": self.run, "model": match[2] if match else ""})

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            text = f"{name} of a wml_ray run, as in MLflow"
            self._gauges[name] = Gauge(f"wml_{name.replace('/', '_')}", text, tag_keys=("run", "model"))
        return self._gauges[name]
