"""A spot machine is announced to go: a checkpoint is written in mid-epoch, and training goes on from it elsewhere."""

import subprocess
import sys

import pytest
from family import tiny_config
from nodes import nodes
from test_run import only_run, steps

from wml_ray.loop import STEPS_BETWEEN_LOOKS

pytestmark = pytest.mark.slow

# Prints how far training has come, in steps, and how many checkpoints of the middle of an epoch there are.
TRAIN = """
import sys
from pathlib import Path
from wml_ray.config import load
from wml_ray.loop import Tick
from wml_ray.run import train

config = load("c.yaml", [])
partial = config.run_folder / "checkpoints" / "partial"

def on_event(event):
    if isinstance(event, Tick):
        print("step", event.step, len(list(partial.glob("epoch-*"))), flush=True)

train(config, on_event)
"""


def test_a_run_on_a_machine_that_is_to_go_continues_in_the_middle_of_its_epoch(workplace):
    """The machine is announced to go, and goes when the checkpoint is there: the next one begins behind it."""
    config = tiny_config("scale.workers=1", "scale.cpus_per_worker=1", "data.batch_size=2", "optim.epochs=2")
    (workplace / "c.yaml").write_text(config.to_yaml())
    before, after = [], []
    with nodes() as cluster:
        ids = [cluster.add(), cluster.add()]
        environment = cluster.environment(RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1")
        run = subprocess.Popen([sys.executable, "-c", TRAIN], env=environment, stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            if not line.startswith("step "):  # Ray's own words on the node that died
                continue
            _, step, partial = line.split()
            (after if before and before[-1][1] else before).append((int(step), int(partial)))
            if len(before) == 1 and not after:
                cluster.announce_preemption(ids[cluster.index_of("ray::RayTrainWorker")], seconds=120)
            elif not after and before[-1][1]:
                cluster.kill(cluster.index_of("ray::RayTrainWorker"))
        assert run.wait(60) == 0
    assert before[-1][1] == 1
    assert after[0][0] > STEPS_BETWEEN_LOOKS
    assert min(step for step, _ in after) > before[-1][0] / 2, (before, after)
    assert steps(only_run(), "train/loss") == [1, 2]
