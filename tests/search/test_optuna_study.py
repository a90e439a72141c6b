"""A study in Optuna: it follows the trial files, and its storage may be away for a while."""

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from servers import free_port
from studies import small_space

from wml_ray.errors import UserError
from wml_ray.search import optuna_study
from wml_ray.search.optuna_study import OptunaStudy, TrialRecord, open_storage
from wml_ray.search.settings import SearchConfig
from wml_ray.storage import retry
from wml_ray.storage.retry import StorageUnavailable


class FailingStorage(optuna.storages.InMemoryStorage):
    """Raises the error of an unreachable database for the next `failures` new trials."""

    failures = 0

    def create_new_trial(self, study_id, template_trial=None):
        if self.failures:
            self.failures -= 1
            raise StorageInternalError("connection refused")
        return super().create_new_trial(study_id, template_trial)


def record(number, state, intermediate=()):
    values = [0.5] if state == "COMPLETE" else None
    return TrialRecord(f"follows/{number}", {"wml.alpha": number / 10}, state, values, dict(intermediate))


def open_study(storage):
    return OptunaStudy(small_space(), SearchConfig(study="follows", trials=9), storage, started=0)


def trials(storage):
    return optuna.load_study(study_name="follows", storage=storage).trials


def test_optuna_gets_the_states_and_points_of_the_records():
    storage = optuna.storages.InMemoryStorage()
    records = [record(0, "COMPLETE"), record(1, "STOPPED", {1: 0.1, 2: 0.2}), record(2, "FAILED"), record(3, "RUNNING")]
    running = open_study(storage).sync(records, "token")
    assert [trial.state.name for trial in trials(storage)] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING"]
    assert [trial.params["wml.alpha"] for trial in trials(storage)] == [0.0, 0.1, 0.2, 0.3]
    assert [trial.value for trial in trials(storage)] == [0.5, 0.2, None, None]
    assert running["follows/3"].params == {"wml.alpha": 0.3}


def test_a_continued_study_resumes_its_running_trials_and_fails_those_without_a_record():
    storage = optuna.storages.InMemoryStorage()
    first = open_study(storage)
    resumed, ended, lost = first.ask(), first.ask(), first.ask()
    first.set_label(resumed, "follows/0")
    first.set_label(ended, "follows/1")
    running = open_study(storage).sync([record(0, "RUNNING"), record(1, "COMPLETE")], "token")
    assert {label: trial.number for label, trial in running.items()} == {"follows/0": resumed.number}
    assert [trial.state.name for trial in trials(storage)] == ["RUNNING", "COMPLETE", "FAIL"]
    assert trials(storage)[lost.number].user_attrs == {}


def test_a_start_point_that_a_dead_driver_enqueued_is_tried_once():
    storage = optuna.storages.InMemoryStorage()
    for _ in range(2):
        open_study(storage).enqueue({"wml.alpha": 0.7})
    study = open_study(storage)
    assert [study.ask().params["wml.alpha"] == 0.7 for _ in range(2)] == [True, False]


def test_a_call_is_retried_until_the_storage_responds(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_S", 0.0)
    storage = FailingStorage()
    study = open_study(storage)
    storage.failures = 1
    assert study.ask().number == 0


def test_a_storage_that_stays_away_is_one_line(monkeypatch):
    monkeypatch.setattr(optuna_study, "DATABASE_TIMEOUT_S", 0.0)
    storage = FailingStorage()
    study = open_study(storage)
    storage.failures = 9
    with pytest.raises(
        StorageUnavailable, match=r"storage .* does not respond \(connection refused\); run the same command"
    ):
        study.ask()


def test_a_storage_that_cannot_be_opened_is_one_line_without_its_password():
    address = f"postgresql+psycopg://someone:secret@127.0.0.1:{free_port()}/nothing"
    with pytest.raises(UserError, match=r"storage 'postgresql\+psycopg://127.0.0.1:") as raised:
        open_storage(address, "study", None)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_storage_with_the_study_of_another_folder_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/optuna.db"
    open_study(open_storage(url, "follows", None)).sync([], "token")
    open_storage(url, "follows", "token")
    for other in (None, "another"):
        with pytest.raises(UserError, match="contains another study named 'follows'"):
            open_storage(url, "follows", other)
