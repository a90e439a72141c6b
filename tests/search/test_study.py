"""A study in its driver, and its trials in MLflow."""

import pytest
from family import taught_by, tiny_config
from ray import tune
from studies import children, small_space

from wml_ray.cluster.space import make_space
from wml_ray.config.load import with_values
from wml_ray.errors import UserError
from wml_ray.search.publisher import Publisher
from wml_ray.search.settings import SearchConfig
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import Trial, TrialStore
from wml_ray.tracking.results import load_study
from wml_ray.tracking.runs import open_run
from wml_ray.training.teacher import load_teacher
from wml_ray.verbs.tune import check_teachers


def complete(number, accuracy, macs):
    entry = {"epoch": 1, "timestamp_ms": 0, "metrics": {"val/accuracy/peer0": accuracy, "peers/macs/tree": macs}}
    return Trial(number, {"wml.alpha": 0.1}, "COMPLETE", history=[entry], final={**entry, "metrics": {}})


def test_an_interrupted_study_closes_the_runs_of_started_trials_and_creates_none(workplace):
    study = RunningStudy(small_space(), SearchConfig(study="halted", trials=2), workplace / "halted", "token")
    publisher = Publisher(study, open_run("halted", "halted", "token", {}, {}))
    _, started = (study.add_trial({"wml.alpha": alpha}, {}) for alpha in (0.1, 0.2))
    study.on_start(started)
    assert study.running() == [started]
    publisher.interrupt()
    assert publisher.close(2.0) == 0
    (run,) = children("halted")
    assert (run.data.tags["wml_ray.trial"], run.info.status) == (str(started.number), "KILLED")


def test_the_best_trial_has_the_best_first_objective_and_the_best_values_are_of_each_objective(tmp_path):
    store = TrialStore(tmp_path)
    for trial in (complete(0, 0.9, 5.0), complete(1, 0.9, 4.0), complete(2, 0.8, 3.0), Trial(3, {"wml.alpha": 0.1})):
        store.write(trial)
    objectives = {"val/accuracy/peer0": "max", "peers/macs/tree": "min"}
    study = RunningStudy(small_space(objectives=objectives), SearchConfig(study="best", trials=4), tmp_path, "token")
    assert study.best().number == 1
    assert study.best_values() == {"val/accuracy/peer0": 0.9, "peers/macs/tree": 3.0}


@pytest.mark.parametrize("content", [b"", b'{"number": 1, ', b"[]", b"{}", b"\xff", b'{"number": 1, "what": 2}'])
def test_a_damaged_trial_file_costs_that_trial_and_its_number_is_not_used_again(tmp_path, content):
    store = TrialStore(tmp_path)
    for number in range(2):
        store.write(complete(number, 0.9, 5.0))
    (tmp_path / "trials" / "0001" / "trial.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"0001/trial\.json is damaged .*continues without this trial"):
        study = RunningStudy(small_space(), SearchConfig(study="cut", trials=2), tmp_path, "token")
    assert (list(study.trials), study.remaining) == ([0], 1)
    assert study.add_trial({"wml.alpha": 0.1}, {}).number == 2


def test_the_config_of_a_trial_names_its_study_and_keeps_the_run_id(tmp_path):
    space = small_space()
    study = RunningStudy(space, SearchConfig(study="named", trials=1), tmp_path, "token")
    config = study.config(study.add_trial({"wml.alpha": 0.5}, {}))
    assert config.run.study == "named/0"
    assert config.run_id == space.config({"wml.alpha": 0.5}).run_id


def test_a_trial_finds_its_teacher_where_the_config_does(tmp_path, teacher_run):
    """Its own storage is the study's folder."""
    overrides = [*taught_by(teacher_run.name, "kd"), f"run.storage_path={teacher_run.parents[1]}"]
    space = make_space(tiny_config(*overrides), {"kd.alpha": tune.uniform(0, 1)}, {"val/accuracy/method": "max"})
    study = RunningStudy(space, SearchConfig(study="taught", trials=1), tmp_path, "token")
    trial = study.add_trial({"kd.alpha": 0.5}, {})
    assert load_teacher(study.local_config(trial)).record["run"] == teacher_run.name
    assert study.local_config(trial).run_id == study.config(trial).run_id


def test_the_teacher_of_each_method_of_a_space_is_checked_before_the_first_trial(teacher_run):
    base = tiny_config(f"teacher.run={teacher_run}")
    methods = {"method.name": tune.choice(["wml", "kd", "rkd"])}
    check_teachers(make_space(base, methods, {"val/accuracy/method": "max"}))
    with pytest.raises(UserError, match=r"teacher.peer = null: rkd imitates one network"):
        check_teachers(make_space(with_values(base, {"teacher.peer": None}), methods, {"val/accuracy/method": "max"}))


def test_a_study_cannot_be_read_without_an_mlflow_store(empty_workplace):
    with pytest.raises(UserError, match=r"mlflow\.db does not exist"):
        load_study("nothing")
