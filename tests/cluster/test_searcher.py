"""The searcher of a study: the order of trials, their number at a time, and their ends."""

import json

import optuna
import pytest
from studies import small_space

from wml_ray.cluster import searcher as searcher_module
from wml_ray.cluster.searcher import PendingError, StudySearcher
from wml_ray.errors import UserError
from wml_ray.search.optuna_study import OptunaStudy
from wml_ray.search.settings import SearchConfig
from wml_ray.search.study import DIED, RunningStudy
from wml_ray.search.trials import Trial, TrialStore

ACCURACY = "val/accuracy/ensemble_weighted"


@pytest.fixture(autouse=True)
def two_trials_at_a_time(monkeypatch):
    monkeypatch.setattr(searcher_module, "max_concurrent_trials", lambda config, settings: 2)


def make_searcher(folder, start_points=()):
    space, search = small_space("scale.max_failures=1"), SearchConfig(study="s", trials=9, sampler="random")
    study, storage = RunningStudy(space, search, folder, "token"), optuna.storages.InMemoryStorage()
    optuna_study = OptunaStudy(space, search, storage, started=len(study.trials))
    return StudySearcher(study, optuna_study, start_points, (), PendingError()), storage


def alpha(settings):
    return json.loads(settings["config"])["wml"]["alpha"]


def report(searcher, settings, epochs, final=True):
    for epoch in range(1, epochs + 1):
        entry = {"epoch": epoch, "timestamp_ms": 0, "metrics": {ACCURACY: epoch / 10}}
        last = {"final": {**entry, "metrics": {}}} if final and epoch == epochs else {}
        searcher.study.on_report(searcher.study.trials[settings["trial"]], {**entry, "sizes": {}, **last})


def states(storage):
    return [trial.state.name for trial in optuna.load_study(study_name="s", storage=storage).trials]


def test_interrupted_trials_come_first_then_start_points_then_points_of_the_sampler(tmp_path, monkeypatch):
    monkeypatch.setattr(searcher_module, "max_concurrent_trials", lambda config, settings: 9)
    TrialStore(tmp_path).write(Trial(0, {"wml.alpha": 0.5}))
    searcher, _ = make_searcher(tmp_path, [{"wml.alpha": 0.1}, {"wml.alpha": 0.2}])  # trial 0 was the first point
    suggestions = [searcher.suggest(trial_id) for trial_id in "abc"]
    assert [settings["trial"] for settings in suggestions] == [0, 1, 2]
    assert [alpha(settings) for settings in suggestions[:2]] == [0.5, 0.2]
    assert alpha(suggestions[2]) not in (0.1, 0.2, 0.5)


def test_the_next_trial_is_suggested_once_a_running_one_ends(tmp_path):
    searcher, _ = make_searcher(tmp_path)
    first = searcher.suggest("a")
    assert searcher.suggest("b")["trial"] == 1
    assert searcher.suggest("c") is None
    report(searcher, first, 3)
    searcher.on_trial_complete("a")
    assert searcher.suggest("c")["trial"] == 2


def test_complete_stopped_and_failed_trials_have_these_states_in_optuna(tmp_path):
    searcher, storage = make_searcher(tmp_path)
    report(searcher, searcher.suggest("complete"), 3)
    searcher.on_trial_complete("complete")
    report(searcher, searcher.suggest("stopped"), 2, final=False)
    searcher.stopped.add("stopped")
    searcher.on_trial_complete("stopped")
    settings = searcher.suggest("failed")
    searcher.study.trials[settings["trial"]].reason = "training diverged"
    searcher.on_trial_complete("failed", error=True)
    assert states(storage) == ["COMPLETE", "PRUNED", "FAIL"]
    assert [trial.state for trial in TrialStore(tmp_path).trials()] == ["COMPLETE", "STOPPED", "FAILED"]


def test_a_trial_whose_process_died_is_suggested_again_until_its_deaths_exceed_max_failures(tmp_path):
    searcher, storage = make_searcher(tmp_path)
    first = searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    assert states(storage) == ["RUNNING"]
    again = searcher.suggest("b")
    assert (again["trial"], alpha(again)) == (0, alpha(first))
    searcher.on_trial_complete("b", error=True)
    (trial,) = TrialStore(tmp_path).trials()
    assert (trial.state, trial.reason) == ("FAILED", DIED)
    assert states(storage) == ["FAIL"]


def test_an_error_that_ends_the_study_is_kept_and_the_trial_stays_running(tmp_path, monkeypatch):
    searcher, _ = make_searcher(tmp_path)
    report(searcher, searcher.suggest("a"), 3)

    def lose_lease(trial):
        raise UserError("another process has taken over the study")

    monkeypatch.setattr(searcher.study.store, "write", lose_lease)
    searcher.on_trial_complete("a")
    assert str(searcher.pending.error) == "another process has taken over the study"
    assert searcher.study.trials[0].state == "RUNNING"
