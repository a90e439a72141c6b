"""Comparisons with Ray Tune and MLflow, killed, continued and extended."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from family import tiny_config
from runs import client, steps
from studies import children

from wml_ray.cli.main import main
from wml_ray.config.load import load_config
from wml_ray.errors import UserError
from wml_ray.search.settings import CompareConfig
from wml_ray.search.trials import TrialStore
from wml_ray.verbs.compare import TUNING_SEED, compare

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
PYTHONPATH = f"{TESTS}{os.pathsep}{TESTS.parent}"  # of trials and of `python -m wml_ray`
COMMAND = ["compare", "c.yaml", "--methods", "wml,dml", "--seeds", "2"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


def small_config(*overrides):
    return tiny_config("optim.epochs=2", "scale.cpus_per_worker=1", *overrides)


def points(study):
    trials = TrialStore(Path("results") / study).trials()
    return [(trial.point["variant"], trial.point["seed"], trial.state) for trial in trials]


@pytest.mark.core
@pytest.mark.usefixtures("ray_cluster")
def test_the_same_command_continues_a_comparison_whose_driver_was_killed(workplace, capsys):
    Path("c.yaml").write_text(small_config("optim.epochs=12").to_yaml())
    Path("c.published.csv").write_text("row,method\nDML of the paper,99.5\n")
    folder = Path("results/wml-compare")
    process = subprocess.Popen([sys.executable, "-m", "wml_ray", *COMMAND], stdout=subprocess.DEVNULL)
    while not any(trial.state == "COMPLETE" for trial in TrialStore(folder).trials()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {trial.number: trial.history for trial in TrialStore(folder).trials() if trial.state == "COMPLETE"}
    assert main(COMMAND) == 0, capsys.readouterr().err
    assert points("wml-compare") == [(method, seed, "COMPLETE") for seed in (0, 1) for method in ("wml", "dml")]
    after = {trial.number: trial.history for trial in TrialStore(folder).trials()}
    assert {number: after[number] for number in before} == before
    runs = children("wml-compare")
    assert [run.info.run_name for run in runs] == ["wml seed=0", "dml seed=0", "wml seed=1", "dml seed=1"]
    for run in runs:
        assert steps(run, "train/loss") == list(range(1, 13))
        assert steps(run, "train/seconds") == steps(run, "train/peak_memory_bytes") == [12]
    shown = capsys.readouterr().out
    assert "4 trials: 4 complete" in shown
    assert "Test accuracy minus that of wml (points), paired by seed" in shown
    assert "DML of the paper (published)" in shown
    with (folder / "report" / "comparison.csv").open() as file:
        found = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    expected = [
        json.loads(path.read_text())["final"]["test/accuracy/method"] for path in folder.glob("trials/*/*/result.json")
    ]
    both = [float(found[method, "test/accuracy/method"]["mean"]) for method in ("wml", "dml")]
    assert sum(both) / 2 == pytest.approx(sum(expected) / 4)
    assert main(["report", "wml-compare"]) == 0
    assert "DML of the paper (published)" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_cluster")
def test_methods_and_seeds_are_added_to_a_comparison_and_other_settings_are_refused(workplace):
    def run(*methods, seeds=1, config=None, **settings):
        return compare(config or small_config(), CompareConfig(study="c", methods=methods, seeds=seeds, **settings))

    run("kd", "independent")  # the teacher of kd trains first
    assert points("c") == [("independent", 0, "COMPLETE"), ("kd", 0, "COMPLETE")]
    (teacher,) = Path("results/c/trials/0000").glob("digits-*")
    (taught,) = Path("results/c/trials/0001").glob("*/result.json")
    assert Path(json.loads(taught.read_text())["config"]["teacher"]["run"]).name == teacher.name
    result = run("dml", "independent", seeds=2)
    assert points("c")[2:] == [("dml", 0, "COMPLETE"), ("dml", 1, "COMPLETE"), ("independent", 1, "COMPLETE")]
    assert result.study.variants == ["dml", "independent", "kd"]
    with pytest.raises(UserError, match=r"was started with another \w+: optim\.epochs was 2 and is now 3; choose"):
        run("wml", config=small_config("optim.epochs=3"))
    assert not run("dml", "independent", seeds=2).trained_now


@pytest.mark.usefixtures("ray_cluster")
def test_each_row_is_compared_at_the_best_of_equally_many_trials_of_another_seed(workplace):
    settings = CompareConfig(study="t", methods=("independent", "kd"), keys=("kd.alpha=0.25",), seeds=1, tune=2)
    result = compare(small_config("optim.epochs=1"), settings)
    assert set(result.study.trials.set_index("variant").loc[["kd alpha=0.25"], "kd.alpha"]) == {0.25}
    for method in settings.methods:
        trials = TrialStore(Path(f"results/t-tune-{method}")).trials()
        assert len(trials) == 2
        configs = [load_config(path) for path in sorted(Path(f"results/t-tune-{method}").glob("trials/*/config.yaml"))]
        assert {config.seed for config in configs} == {TUNING_SEED}
        assert configs[0].optim.learning_rate == small_config().optim.learning_rate
        scores = [trial.results()["val/accuracy/method"] for trial in trials]
        best = configs[scores.index(max(scores))]
        compared = result.study.trials.set_index("variant").loc[method]
        assert compared["optim.learning_rate"] == best.optim.learning_rate
        assert compared["seed"] == 0
    assert (result.folder / "report" / "report.html").read_text().count("optim.learning_rate=") == 3
    assert client().get_experiment_by_name("t-tune-kd")
