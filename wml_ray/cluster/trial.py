"""One trial of a study in an actor of Ray Tune."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray.tune
import torch
from ray.util.placement_group import PlacementGroup

from wml_ray.cluster.connect import WorkerEnvironment
from wml_ray.cluster.gauges import Gauges
from wml_ray.cluster.preemption import PreemptionNotice, watch_node
from wml_ray.cluster.resources import has_several_workers
from wml_ray.cluster.train import fit_trial
from wml_ray.config.load import parse_config
from wml_ray.config.schema import Config
from wml_ray.distributed import WorkerRank
from wml_ray.errors import Diverged, UserError, one_line
from wml_ray.storage.lease import Lease, LeaseLost
from wml_ray.storage.retry import StorageUnavailable
from wml_ray.training.worker import WorkerContext, run_worker

STOP_TIMEOUT_S = 60  # for a stopped trial to finish its epoch and to end its workers


def train_trial(settings: dict[str, Any], worker_environment: ray.ObjectRef) -> None:
    """Train a trial in this actor, or on workers that this actor starts. `settings` are those of `StudySearcher`,
    `worker_environment` is that of `WorkerEnvironment.send`.
    """
    environment = WorkerEnvironment.receive(worker_environment)
    environment.apply()
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(STOP_TIMEOUT_S)  # after it, Ray Tune fails the next trial
    try:
        config = parse_config(json.loads(settings["config"]))
        reporter = _Reporter(config.optim.epochs)
        if has_several_workers(config):
            name = ray.tune.get_context().get_trial_id()
            fit_trial(config, reporter.log, reporter.on_placement, name, environment.lease)
        else:
            _train_here(config, reporter, environment.lease)
    except (LeaseLost, StorageUnavailable) as error:  # all other trials would fail in the same way
        ray.tune.report({"study_error": str(error)})
        raise
    except ray.exceptions.RayError:  # a process died; the trial may start again
        raise
    except Exception as error:
        ray.tune.report({"failed": _message(error)})
        raise


class _Reporter:
    """Collects the metrics of `run_worker` into one report to Ray Tune for each epoch.

    The last epoch is reported together with the test: a scheduler ends a trial as soon as it has the full budget.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.started_ms = time.time() * 1000
        self.sizes: dict[str, float] = {}
        self.last: dict[str, Any] = {}

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int) -> None:
        entry = {"epoch": step, "timestamp_ms": timestamp_ms, "metrics": dict(metrics)}
        if step == 0:
            self.sizes = dict(metrics)
        elif "test/accuracy/peer0" in metrics:
            self._report({**self.last, "final": entry})
        elif step == self.epochs:
            self.last = entry
        else:
            self._report(entry)

    def on_placement(self, group: PlacementGroup) -> None:
        """Report the workers' placement group, which the driver removes if this process dies; Ray would keep it."""
        ray.tune.report({"placement_group": group})

    def _report(self, entry: dict[str, Any]) -> None:
        metrics = {**self.sizes, **entry["metrics"]}
        past = entry["timestamp_ms"] < self.started_ms  # the epoch was trained before a restart
        report = json.dumps({**entry, "sizes": self.sizes})  # a text: Ray Tune keeps statistics of nested numbers
        ray.tune.report({"epoch": entry["epoch"], "past": past, **metrics, "report": report})
        self.sizes = {}


def _train_here(config: Config, reporter: _Reporter, lease: Lease | None) -> None:
    torch.set_num_threads(config.scale.cpus_per_worker or 1)
    device = torch.device("cuda" if config.scale.gpu else "cpu")
    gauges = Gauges(config.run_id)
    with watch_node() as node_preempted:
        notice = PreemptionNotice(node_preempted)
        run_worker(config, WorkerContext(WorkerRank(), device, gauges.show, reporter.log, lease, notice.preempted))


def _message(error: Exception) -> str:
    text = one_line(error, limit=1000)
    return text if isinstance(error, (Diverged, UserError)) else f"{type(error).__name__}: {text}"
