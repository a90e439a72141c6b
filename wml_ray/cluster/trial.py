"""One trial of a study, as Ray Tune runs it in an actor."""

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
from wml_ray.distributed import WorkerRank
from wml_ray.errors import Diverged, UserError, one_line
from wml_ray.storage.lease import LeaseLost
from wml_ray.storage.retry import StorageUnavailable
from wml_ray.training.worker import WorkerContext, run_worker

STOP_TIMEOUT_S = 60  # how long a stopped trial may take to the end of its epoch and to give back its workers


class _Reporter:
    """Gathers what `run_worker` logs into one report to Ray Tune an epoch.

    The last epoch waits for the test, which comes after it: a scheduler that is told of the full budget ends the trial.
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

    def placed(self, group: PlacementGroup) -> None:
        """Tell the driver what to free should this process die: Ray keeps it until the job ends."""
        ray.tune.report({"placed": group})

    def _report(self, entry: dict[str, Any]) -> None:
        metrics = {**self.sizes, **entry["metrics"]}
        past = entry["timestamp_ms"] < self.started_ms  # of a trial that was interrupted
        report = {**entry, "sizes": self.sizes}
        ray.tune.report({"epoch": entry["epoch"], "past": past, **metrics, "report": report})
        self.sizes = {}


def train_trial(settings: dict[str, Any], worker_environment: WorkerEnvironment) -> None:
    """What Ray Tune runs in a trial's actor: the whole training, or the start of one on several workers."""
    worker_environment.apply()
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(
        STOP_TIMEOUT_S
    )  # Ray Tune fails the next trial if this one takes longer
    try:
        config = parse_config(json.loads(settings["config"]))
        reporter = _Reporter(config.optim.epochs)
        if has_several_workers(config):
            name = ray.tune.get_context().get_trial_id()
            fit_trial(config, reporter, name, worker_environment.lease)
        else:
            torch.set_num_threads(config.scale.cpus_per_worker or 1)
            device = torch.device("cuda" if config.scale.gpu else "cpu")
            gauges = Gauges(config.run_id)
            with watch_node() as is_to_go:
                notices = PreemptionNotice(WorkerRank(), is_to_go)
                context = WorkerContext(
                    WorkerRank(), device, gauges.show, reporter.log, worker_environment.lease, notices.preempted
                )
                run_worker(config, context)
    except (LeaseLost, StorageUnavailable) as error:  # nothing that another trial would not meet too
        ray.tune.report({"halted": str(error)})
        raise
    except ray.exceptions.RayError:  # one of its processes died; another start may do
        raise
    except Exception as error:
        ray.tune.report({"failed": _in_one_line(error)})
        raise


def _in_one_line(error: Exception) -> str:
    text = one_line(error, limit=1000)
    return text if isinstance(error, (Diverged, UserError)) else f"{type(error).__name__}: {text}"
