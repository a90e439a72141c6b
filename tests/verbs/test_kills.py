"""Trainings whose processes are killed with SIGKILL again and again, at random moments, also while they start.

WML_TEST_KILLS is the number of kills of all tests together.
"""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import psutil
import pytest
import ray
from deadline import DEADLINE_S
from family import tiny_config
from nodes import kill_all, named
from runs import assert_bit_equal, assert_logged_once, client, history_of, train_here

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.title import run_title

pytestmark = pytest.mark.nightly

KILLS = int(os.environ.get("WML_TEST_KILLS", "100"))
SHARES = {"in process": 0.76, "group": 0.08, "driver": 0.08, "worker": 0.08}  # Ray's workers take long to start
TWO = ["scale.workers=2", "scale.cpus_per_worker=1", "scale.max_failures=1000"]
FORKS = multiprocessing.get_context("forkserver")  # a process starts with all imports done
FORKS.set_forkserver_preload(["runs", "family", "wml_ray.verbs.train", "mlflow.store.tracking.sqlalchemy_store"])


class Kills:
    """A run that is started, killed and started again."""

    def __init__(self, config, kill, draw, environment):
        self.config, self.kill, self.draw, self.environment = config, kill, draw, environment
        self.checkpoints = Checkpoints(config.run_folder / "checkpoints", config.run.keep_checkpoints)
        self.driver = None

    def start(self):
        if self.driver is None or not self.driver.is_alive():
            arguments = (self.config.to_yaml(), str(Path.cwd()), self.environment)
            self.driver = FORKS.Process(target=train_here, args=arguments)
            self.driver.start()

    def kill_at_a_random_moment(self):
        """Mostly after one more epoch, sometimes while the process starts."""
        self.start()
        if self.draw.random() < 0.8:
            self.wait_for_an_epoch()
            time.sleep(self.draw.uniform(0, 0.3))
        else:
            time.sleep(self.draw.uniform(0, 5))
        assert self.driver.is_alive(), "training was too fast to be killed: raise the number of epochs"
        self.kill(self.driver)

    def wait_for_an_epoch(self):
        before, deadline_s = self.checkpoints.epochs(), time.monotonic() + DEADLINE_S
        while not (now := self.checkpoints.epochs()) or now[-1] <= max(before, default=0):
            assert self.driver.is_alive()
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    def finish(self):
        self.start()
        self.driver.join(DEADLINE_S)
        assert self.driver.exitcode == 0


def kill_driver(driver):
    driver.kill()
    driver.join()


def killers(draw):
    """What is killed, by the name of the test's variant."""

    def workers():
        return named(psutil.Process(), "ray::RayTrainWorker")

    def group(driver):
        kill_all([*workers(), *named(psutil.Process(), "ray::TrainController")])
        kill_driver(driver)

    def worker(driver):
        deadline_s = time.monotonic() + DEADLINE_S
        while len(running := workers()) < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        kill_all([draw.choice(running)])

    return {"group": group, "driver": kill_driver, "worker": worker}


@pytest.mark.usefixtures("ray_cluster")  # before the first fork: a process reads Ray's authentication mode at import
@pytest.mark.parametrize("variant", SHARES)
def test_a_run_that_is_killed_many_times_equals_an_undisturbed_one(workplace, variant):
    kills = max(1, round(KILLS * SHARES[variant]))
    draw = random.Random(kills)
    overrides = [f"optim.epochs={4 * kills}", "data.batch_size=32"]
    kill, environment = kill_driver, {}
    if variant != "in process":
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        overrides += TWO
        kill = killers(draw)[variant]
    whole = Kills(tiny_config(*overrides, "run.name=whole"), kill, draw, environment)
    whole.finish()
    killed = Kills(tiny_config(*overrides, "run.name=killed"), kill, draw, environment)
    for _ in range(kills):
        killed.kill_at_a_random_moment()
    killed.finish()
    last = f"epoch-{4 * kills:04d}"
    assert_bit_equal(killed.checkpoints.folder / last, whole.checkpoints.folder / last)
    results = [json.loads((run.config.run_folder / "result.json").read_text()) for run in (whole, killed)]
    assert history_of(results[0]) == history_of(results[1])
    for run, result in zip((whole, killed), results, strict=True):
        assert_logged_once(logged(run.config), result)
    print(f"{kills} kills ({variant}) in {4 * kills} epochs")


def logged(config):
    (run,) = client().search_runs([client().get_experiment_by_name(config.run.name).experiment_id])
    assert run.info.run_name == run_title(config)
    return run
