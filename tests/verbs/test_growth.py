"""Long runs and studies: memory, descriptors, threads and temporary files do not grow."""

import gc
import json
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from family import tiny_config
from optuna.storages import InMemoryStorage
from ray import tune as ray_tune_api
from studies import small_space

from wml_ray.cluster.tune import run_trials
from wml_ray.search.settings import SearchConfig
from wml_ray.search.study import RunningStudy
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train

pytestmark = pytest.mark.nightly

LIMITS = {"MiB": 0.02, "descriptors": 0.02, "threads": 0.02, "temporary files": 0.02, "shared memory files": 0.02}
TRIAL_MIB = 0.08  # Ray Tune keeps the trial and statistics of its metrics, 0.05 MiB


class Usage:
    """What this process uses, measured again and again."""

    def __init__(self):
        self.process, self.rows = psutil.Process(), []

    def measure(self):
        gc.collect()
        self.rows.append(
            {
                "MiB": self.process.memory_info().rss / 2**20,
                "descriptors": self.process.num_fds(),
                "threads": threading.active_count(),
                "temporary files": len(os.listdir(tempfile.gettempdir())),
                "shared memory files": len(list(Path("/dev/shm").glob("wml_ray*"))),
            }
        )

    def slopes(self):
        """The growth of each quantity from one measurement to the next, over the second half."""
        rows = self.rows[len(self.rows) // 2 :]
        return {name: float(np.polyfit(range(len(rows)), [row[name] for row in rows], 1)[0]) for name in rows[0]}


def assert_no_growth(usage, **limits):
    slopes = usage.slopes()
    print({name: round(slope, 4) for name, slope in slopes.items()}, usage.rows[len(usage.rows) // 2], usage.rows[-1])
    assert not {name: slope for name, slope in slopes.items() if slope > {**LIMITS, **limits}[name]}


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path_factory, monkeypatch):
    """A temporary folder in which nothing else writes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


def test_300_epochs_leave_no_memory_descriptors_threads_or_files_behind(workplace):
    usage = Usage()

    def on_event(event):
        if isinstance(event, EpochEnd):
            usage.measure()

    train(tiny_config("optim.epochs=300", "data.train_images=256"), on_event)
    assert len(usage.rows) == 300
    assert_no_growth(usage)


@pytest.mark.usefixtures("ray_cluster")
def test_200_trials_leave_no_descriptors_threads_or_files_behind_and_no_memory_but_their_records(workplace):
    def train_nothing(settings, worker_environment):  # here: Ray's workers cannot import this file
        value = settings["trial"] / 200
        entry = {"epoch": 1, "timestamp_ms": 0, "metrics": {"val/accuracy/ensemble_weighted": value}}
        report = json.dumps({**entry, "sizes": {}, "final": entry})
        ray_tune_api.report({"epoch": 1, **entry["metrics"], "report": report})

    usage, search = Usage(), SearchConfig(study="many", trials=200, sampler="random", scheduler="none")

    def on_change(study):
        if len(study.trials) - study.counts()["RUNNING"] > len(usage.rows):
            usage.measure()

    study = RunningStudy(small_space("optim.epochs=1"), search, Path("results/many").resolve(), "token", on_change)
    run_trials(study, InMemoryStorage(), trial_function=train_nothing)
    assert len(usage.rows) > 150
    assert_no_growth(usage, MiB=TRIAL_MIB)
