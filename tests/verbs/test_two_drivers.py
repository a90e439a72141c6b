"""Two processes that are given the same work: one does it, the other is refused, and nothing is done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from deadline import DEADLINE_S
from family import tiny_config, write_study
from runs import assert_logged_once, only_run, steps
from studies import children

from wml_ray.search.trials import TrialStore

pytestmark = pytest.mark.nightly

TESTS = Path(__file__).parents[1]


def start_two(*words):
    """The same command twice, at the same moment."""
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "wml_ray", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]


def assert_one_is_refused(processes):
    """One ends with code 0; the other says in one line who has the folder."""
    errors = [process.communicate(timeout=DEADLINE_S)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], errors
    (refused,) = [text for process, text in zip(processes, errors, strict=True) if process.returncode == 2]
    assert "is in use by process" in refused.splitlines()[-1]
    assert "Traceback" not in "".join(errors)


def test_two_trainings_on_one_folder_train_and_log_every_epoch_once(workplace):
    config = tiny_config("optim.epochs=100")
    (workplace / "config.yaml").write_text(config.to_yaml())
    assert_one_is_refused(start_two("train", "config.yaml"))
    assert_logged_once(only_run(), json.loads((config.run_folder / "result.json").read_text()))


def test_two_drivers_of_one_study_train_and_log_every_trial_once(workplace):
    write_study(workplace, tiny_config("optim.epochs=25", "scale.cpus_per_worker=1"))
    words = ("tune", "c.yaml", "--space", "alpha.py", "--trials", "3", "--scheduler", "none")
    assert_one_is_refused(start_two(*words))
    trials = TrialStore(Path("results/wml-alpha")).trials()
    assert [(trial.number, trial.state) for trial in trials] == [(number, "COMPLETE") for number in range(3)]
    runs = children("wml-alpha")
    assert [run.data.tags["wml_ray.trial"] for run in runs] == ["0", "1", "2"]
    assert [steps(run, "train/loss") for run in runs] == [list(range(1, 26))] * 3
