"""Studies on a cluster with Ray's own autoscaler, which starts and stops nodes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from autoscaler import autoscaling_cluster
from deadline import DEADLINE_S
from family import tiny_config, write_study

from wml_ray.search.trials import TrialStore

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.nightly

COUNT_NODES = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while True:
    print(sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()), flush=True)
    time.sleep(0.5)
"""


def test_a_study_scales_a_cluster_up_from_zero_nodes_and_down_again(workplace):
    """The head has no CPU: at most two nodes start for the trials, all trials finish, and the nodes stop."""
    config = tiny_config("optim.epochs=60", "scale.cpus_per_worker=1", "run.name=grown")
    write_study(workplace, config)
    with autoscaling_cluster(max_nodes=2) as address:
        environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        environment["PYTHONPATH"] = str(TESTS)
        counter = subprocess.Popen(
            [sys.executable, "-c", COUNT_NODES, address], env=environment, stdout=subprocess.PIPE, text=True
        )
        command = [sys.executable, "-m", "wml_ray", "tune", "c.yaml", "--space", "alpha.py", "--trials", "4"]
        dry = [*command, "--dry-run", "scale.workers=3"]
        too_large = subprocess.Popen(dry, env=environment, stdout=subprocess.PIPE, text=True)
        done = subprocess.run(
            [*command, "--scheduler", "none"], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
        refusal, _ = too_large.communicate(timeout=DEADLINE_S)
        assert too_large.returncode == 2
        counts = []
        deadline_s = time.monotonic() + 90
        for line in counter.stdout:
            counts.append(int(line))
            if (counts[-1] == 0 and max(counts) > 0) or time.monotonic() > deadline_s:
                break
        counter.kill()
        counter.wait()
    assert "NO  3 workers with 1 CPU core each do not fit" in refusal
    assert "and no autoscaler that adds the rest" in refusal
    assert done.returncode == 0, done.stderr
    assert [trial.state for trial in TrialStore(Path("results/grown-alpha")).trials()] == ["COMPLETE"] * 4
    assert (counts[0], max(counts), counts[-1]) == (0, 2, 0)


def test_a_trial_that_fits_no_node_is_an_error_before_the_first(workplace):
    write_study(workplace, tiny_config("scale.cpus_per_worker=64"))
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "wml_ray", "tune", "c.yaml", "--space", "alpha.py", "--trials", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert (
        "with 64 CPU cores each does not fit: this cluster has 0 such slots, and no autoscaler that adds the rest"
        in done.stderr
    )
    assert not list(workplace.glob("results/*/study.json"))
