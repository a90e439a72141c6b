"""Studies with Ray Tune, Optuna and MLflow; their drivers, trials and databases are killed by signals."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
import pandas as pd
import psutil
import pytest
from deadline import DEADLINE_S
from family import tiny_config, write_study
from postgres import postgres
from ray import tune as ray_tune_api
from runs import client, end, steps
from studies import ACCURACY, ALPHA, children, small_space

from wml_ray.cli.main import main
from wml_ray.cluster import trial as trial_module
from wml_ray.config.load import load_config
from wml_ray.errors import UserError
from wml_ray.search.settings import SearchConfig
from wml_ray.search.study import DIED
from wml_ray.search.trials import TrialStore
from wml_ray.storage.lease import LEASE_FILE
from wml_ray.storage.retry import StorageUnavailable
from wml_ray.tracking.results import load_study
from wml_ray.verbs.study import Study
from wml_ray.verbs.tune import tune

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
PYTHONPATH = f"{TESTS}{os.pathsep}{TESTS.parent}"  # of trials and of `python -m wml_ray`


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


def parent(study):
    experiment = client().get_experiment_by_name(study).experiment_id
    (run,) = client().search_runs([experiment], "tags.`wml_ray.kind` = 'study'")
    return run


@dataclass
class FinishedStudy:
    """A study of two trials, continued to three trials, then started again for one trial."""

    workplace: Path
    results: list[Study]
    files_of_two: dict[Path, bytes]
    """The trial files after the second trial."""
    errors_of_second_start: list[str]
    """Errors of the same study, started while it ran."""


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory, migrated_store, ray_cluster):
    workplace, errors = tmp_path_factory.mktemp("finished"), []
    shutil.copy(migrated_store, workplace)

    def start_again(study):
        if not errors:
            with pytest.raises(UserError) as raised:
                tune(study.space, study.search)
            errors.append(str(raised.value))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setenv("PYTHONPATH", PYTHONPATH)
        search = SearchConfig(study="whole", trials=2, grace_epochs=3, storage="sqlite:///optuna.db")
        results = [tune(small_space(), search, start_again)]
        files = {path: path.read_bytes() for path in Path("results/whole/trials").glob("*/trial.json")}
        for trials in (3, 1):
            results.append(tune(small_space(), search.model_copy(update={"trials": trials})))
        yield FinishedStudy(workplace, results, files, errors)


@pytest.fixture
def finished(finished_study, monkeypatch):
    monkeypatch.chdir(finished_study.workplace)
    return finished_study


@pytest.mark.core
def test_mlflow_has_all_params_metrics_tags_and_files_of_each_trial(finished):
    runs = children("whole")
    assert [run.info.run_name for run in runs] == ["trial 0", "trial 1", "trial 2"]
    for number, run in enumerate(runs):
        assert run.data.tags["wml_ray.state"] == "COMPLETE"
        assert run.info.status == "FINISHED"
        assert run.data.params["run.study"] == f"whole/{number}"
        for metric in ("train/loss", "val/accuracy/peer3", "val/accuracy/smallest_peer", "weights/peer0"):
            assert steps(run, metric) == [1, 2, 3]
        for metric in ("test/accuracy/peer0", "test/accuracy/ensemble_average", "peers/latency_ms/peer3"):
            assert steps(run, metric) == [3]
        assert steps(run, "peers/macs/tree") == [0]
        files = {file.path for file in client().list_artifacts(run.info.run_id)}
        assert files == {"config.yaml", "peers.csv", "pictures"}


def test_mlflow_has_the_settings_the_report_and_the_best_values_of_the_study(finished):
    run = parent("whole")
    assert run.info.status == "FINISHED"
    assert run.data.params["space.wml.alpha"] == "0.0 to 0.9"
    assert run.data.params["objective.val/accuracy/ensemble_weighted"] == "max"
    assert run.data.params["search.scheduler"] == "asha"
    accuracies = finished.results[1].study.trials["val/accuracy/ensemble_weighted"]
    assert run.data.metrics["best/val/accuracy/ensemble_weighted"] == accuracies.max()
    report = {file.path for file in client().list_artifacts(run.info.run_id, "report")}
    assert {"report/report.html", "report/history.png", "report/trials.csv"} <= report


def test_the_best_config_is_that_of_the_best_trial_and_names_it(finished):
    trials = finished.results[1].study.trials
    best = trials.sort_values("val/accuracy/ensemble_weighted", kind="stable", ascending=False).iloc[0]
    logged = client().download_artifacts(parent("whole").info.run_id, "config.yaml")
    for path in ("results/whole/config.yaml", logged):
        config = load_config(path)
        assert config.wml.alpha == best["wml.alpha"]
        assert (config.run.name, config.run.storage_path) == ("wml", "results")
        assert config.run.study == f"whole/{best['trial']}"


def test_more_trials_add_the_difference_and_fewer_add_none(finished):
    assert [result.trained_now for result in finished.results] == [True, True, False]
    assert [path.parent.name for path in sorted(finished.files_of_two)] == ["0000", "0001"]
    assert {path: path.read_bytes() for path in finished.files_of_two} == finished.files_of_two
    assert [run.data.tags["wml_ray.trial"] for run in children("whole")] == ["0", "1", "2"]
    assert len({run.data.params["wml.alpha"] for run in children("whole")}) == 3
    stored = optuna.load_study(study_name="whole", storage="sqlite:///optuna.db").trials
    assert [trial.params for trial in stored] == [trial.point for trial in TrialStore(Path("results/whole")).trials()]


def test_two_processes_cannot_run_one_study(finished):
    (error,) = finished.errors_of_second_start
    assert "is in use by" in error


@pytest.mark.parametrize(
    "other",
    [
        lambda: small_space("wml.temperature=2"),
        lambda: small_space(domains={"wml.alpha": ray_tune_api.uniform(0.0, 0.5)}),
        lambda: small_space(objectives={"val/accuracy/peer0": "max"}),
    ],
    ids=["config", "space", "objectives"],
)
def test_another_space_or_config_does_not_continue_a_study(finished, other):
    with pytest.raises(UserError, match="was started with another"):
        tune(other(), SearchConfig(study="whole", trials=4))


def test_settings_that_do_not_change_the_networks_continue_a_study(finished):
    space = small_space("run.name=moved", "scale.max_failures=1")
    assert not tune(space, SearchConfig(study="whole", trials=3)).trained_now


def test_a_study_of_another_folder_cannot_share_the_storage(finished):
    search = SearchConfig(study="whole", trials=1, storage="sqlite:///optuna.db")
    with pytest.raises(UserError, match="contains another study named 'whole'"):
        tune(small_space("run.storage_path=elsewhere"), search)


def test_a_damaged_study_file_is_one_line_and_the_study_continues_once_it_is_deleted(finished):
    shutil.copytree("results/whole", "results/copy")
    path, search = Path("results/copy/study.json"), SearchConfig(study="copy", trials=3, grace_epochs=3)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"study\.json is damaged \(.*\); delete it"):
        tune(small_space(), search)
    path.unlink()
    again = tune(small_space(), search)
    assert not again.trained_now
    columns = ["state", "wml.alpha", "val/accuracy/ensemble_weighted"]
    assert again.study.trials[columns].equals(finished.results[1].study.trials[columns])


def test_the_sampler_learns_from_an_earlier_study(finished):
    search = SearchConfig(study="second", trials=1, scheduler="none", storage="sqlite:///second.db")
    tune(small_space(), search, warm_start=["whole"])
    stored = optuna.load_study(study_name="second", storage="sqlite:///second.db").trials
    earlier = [trial.point for trial in TrialStore(Path("results/whole")).trials()]
    assert [trial.params for trial in stored[:3]] == earlier
    assert len(stored) == 4


def test_an_earlier_study_that_does_not_exist_is_one_line(finished):
    with pytest.raises(UserError, match=r"^experiment .never. does not exist at "):
        tune(small_space(), SearchConfig(study="third", trials=1), warm_start=["never"])


@pytest.mark.usefixtures("ray_cluster")
def test_trials_that_diverge_or_die_are_failed_in_all_stores_and_never_best(workplace):
    """Trial 0 diverges; trial 1 is killed and may not restart."""
    domains = {"optim.learning_rate": ray_tune_api.choice([0.05, 0.1, 100.0])}
    decay = ["optim.weight_decay=10", "optim.schedule=constant"]
    space = small_space("scale.max_failures=0", *decay, "optim.epochs=20", domains=domains)
    killed = []

    def kill_trial_1(study):
        if len(study.trials) > 1 and study.trials[1].epochs == 2 and not killed:
            killed.append(max(trial_processes(study, 1)))
            os.kill(killed[0], signal.SIGKILL)

    start = [{"optim.learning_rate": 100.0}, {"optim.learning_rate": 0.05}]
    search = SearchConfig(
        study="bad", trials=4, scheduler="none", storage="sqlite:///bad.db", sampler="random", concurrent=1
    )
    result = tune(space, search, kill_trial_1, start)
    trials = result.study.trials.set_index("trial")
    assert killed
    assert list(trials["state"][:2]) == ["FAILED", "FAILED"]
    assert "training diverged" in trials["reason"][0]
    assert trials["reason"][1] == DIED
    assert Counter(run.info.status for run in children("bad"))["FAILED"] == sum(trials["state"] == "FAILED")
    stored = optuna.load_study(study_name="bad", storage="sqlite:///bad.db").trials
    assert [trial.state.name == "FAIL" for trial in stored] == list(trials["state"] == "FAILED")
    assert all(trial.values is None for trial in stored if trial.state.name == "FAIL")
    taken = load_config(client().download_artifacts(parent("bad").info.run_id, "config.yaml", str(workplace)))
    assert taken.optim.learning_rate < 1


def trial_processes(study, number):
    """Ids of the processes below this one whose working directory is that of a trial."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"trial-{number:04d}-" in process.cwd():
                found.append(process.pid)
    return found


@pytest.mark.core
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_trial_resumes_from_its_checkpoint(workplace):
    killed = []

    def kill_once(study):
        if study.trials[0].epochs == 5 and not killed:
            killed.append(max(trial_processes(study, 0)))
            killed.append([entry["timestamp_ms"] for entry in study.trials[0].history])
            os.kill(killed[0], signal.SIGKILL)

    tune(small_space("optim.epochs=12"), SearchConfig(study="once", trials=1, scheduler="none"), kill_once)
    (trial,) = TrialStore(Path("results/once")).trials()
    assert trial.state == "COMPLETE"
    assert [entry["timestamp_ms"] for entry in trial.history][:5] == killed[1]
    assert steps(children("once")[0], "train/loss") == list(range(1, 13))


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_dies_between_two_trials_fails_neither(workplace):
    """Ray Tune reuses the actor for the next trial and reports its death twice."""
    killed = []

    def kill_once(study):
        if study.counts()["COMPLETE"] == 1 and not killed:
            killed.append(max(trial_processes(study, 0)))
            os.kill(killed[0], signal.SIGKILL)

    tune(small_space(), SearchConfig(study="between", trials=3, scheduler="none", concurrent=1), kill_once)
    assert killed
    assert [trial.state for trial in TrialStore(Path("results/between")).trials()] == ["COMPLETE"] * 3
    assert [run.info.status for run in children("between")] == ["FINISHED"] * 3


@pytest.mark.usefixtures("ray_cluster")
def test_unavailable_storage_of_a_trial_ends_the_study_and_fails_no_trial(workplace, monkeypatch):
    def train_without_storage(settings, worker_environment):
        def run_worker(*_):
            raise StorageUnavailable("the storage does not respond")

        trial_module.run_worker = run_worker
        trial_module.train_trial(settings, worker_environment)

    monkeypatch.setattr("wml_ray.cluster.tune.train_trial", train_without_storage)
    with pytest.raises(UserError, match=r"^the storage does not respond$"):
        tune(small_space(), SearchConfig(study="away", trials=2, scheduler="none"))
    assert {trial.state for trial in TrialStore(Path("results/away")).trials()} == {"RUNNING"}
    assert {run.info.status for run in [parent("away"), *children("away")]} <= {"FAILED", "KILLED"}


@pytest.mark.usefixtures("ray_cluster")
def test_the_scheduler_stops_bad_trials_and_their_checkpoints_are_deleted(workplace):
    domains = {"optim.learning_rate": ray_tune_api.choice([0.1, 1e-6])}
    start = [{"optim.learning_rate": rate} for rate in (0.1, 0.1, 0.1, 1e-6)]
    search = SearchConfig(study="stops", trials=4, scheduler="median", grace_epochs=2, storage="sqlite:///stops.db")
    result = tune(
        small_space("optim.epochs=6", domains=domains), search.model_copy(update={"concurrent": 1}), None, start
    )
    trials = result.study.trials
    assert list(trials["state"]) == ["COMPLETE"] * 3 + ["STOPPED"]
    assert trials["epochs"][3] < 6
    assert children("stops")[3].data.tags["wml_ray.reason"] == f"stopped early after epoch {trials['epochs'][3]}"
    assert not list(Path("results/stops/trials/0003").glob("*/checkpoints"))
    assert len(list(Path("results/stops/trials/0000").glob("*/checkpoints/*"))) <= 3
    states = [trial.state.name for trial in optuna.load_study(study_name="stops", storage="sqlite:///stops.db").trials]
    assert states == ["COMPLETE"] * 3 + ["PRUNED"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_under_hyperband_that_continues_has_each_point_once(workplace):
    domains = {"wml.alpha": ray_tune_api.choice([0.0, 0.3]), "optim.nesterov": ray_tune_api.choice([True, False])}
    search = SearchConfig(study="grid", trials=2, sampler="grid", scheduler="hyperband", grace_epochs=1)
    for trials in (2, 4):
        tune(small_space(domains=domains), search.model_copy(update={"trials": trials}))
    trials = TrialStore(Path("results/grid")).trials()
    assert {tuple(trial.point.values()) for trial in trials} == {(a, n) for a in (0.0, 0.3) for n in (True, False)}
    assert {trial.state for trial in trials} <= {"COMPLETE", "STOPPED"}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("sampler", ["gp", pytest.param("cmaes", marks=pytest.mark.nightly)])
def test_a_study_with_a_sampler_that_learns_from_its_trials(workplace, sampler):
    domains = {**ALPHA, "optim.momentum": ray_tune_api.uniform(0.0, 0.9)}
    search = SearchConfig(study="learns", trials=6, sampler=sampler, scheduler="hyperband", grace_epochs=1)
    for trials in (6, 7):
        tune(small_space(domains=domains), search.model_copy(update={"trials": trials}))
    trials = TrialStore(Path("results/learns")).trials()
    assert len({tuple(trial.point.values()) for trial in trials}) == 7
    assert {trial.state for trial in trials} <= {"COMPLETE", "STOPPED"}
    assert [run.info.status for run in children("learns")] == ["FINISHED"] * 7


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "sampler", ["tpe", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("nsga2", "random"))]
)
def test_several_objectives_with_every_sampler_and_asha(workplace, capsys, sampler):
    objectives = {"val/accuracy/smallest_peer": "max", "peers/macs/tree": "min", "peers/latency_ms/peer0": "min"}
    domains = {"pruning.ratios.3": ray_tune_api.uniform(0.0, 0.3), **ALPHA}
    result = tune(
        small_space(domains=domains, objectives=objectives), SearchConfig(study="many", trials=3, sampler=sampler)
    )
    complete = result.study.trials[result.study.trials["state"] == "COMPLETE"]
    assert complete[list(objectives)].notna().all(axis=None)
    capsys.readouterr()  # the progress of the study
    assert main(["report", "many", "--csv"]) == 0
    (workplace / "out.csv").write_text(capsys.readouterr().out)
    table = pd.read_csv("out.csv")
    assert list(table["trial"]) == [0, 1, 2]
    assert table["wml.alpha"].tolist() == pytest.approx(result.study.trials["wml.alpha"].tolist())


@pytest.mark.core
def test_the_same_command_continues_a_study_whose_driver_was_killed(workplace):
    """Killed twice: while the first trials train, and after some are finished."""
    config = tiny_config("optim.epochs=25", "scale.cpus_per_worker=1")
    write_study(workplace, config)
    folder = Path("results/wml-alpha/trials")
    before = {}
    for condition in ("0000/*/checkpoints/epoch-0004", "0002/*/checkpoints/epoch-0003"):
        process = start_tune()
        while not list(folder.glob(condition)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.wait()
        plan = json.loads(max(folder.glob(f"{condition[:4]}/*/checkpoints/*/plan.json")).read_text())
        before[int(condition[:4])] = [entry["timestamp_ms"] for entry in plan["history"]]
    finished = [trial for trial in TrialStore(folder.parent).trials() if trial.state == "COMPLETE"]
    process = start_tune()
    out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert "4 trials: 4 complete" in out
    assert finished
    after = TrialStore(folder.parent).trials()
    assert [after[trial.number].history for trial in finished] == [trial.history for trial in finished]
    for number, timestamps in before.items():
        assert [entry["timestamp_ms"] for entry in after[number].history][: len(timestamps)] == timestamps
    assert [run.data.tags["wml_ray.trial"] for run in children("wml-alpha")] == ["0", "1", "2", "3"]
    for run in children("wml-alpha"):
        assert steps(run, "train/loss") == list(range(1, 26))
        assert steps(run, "test/accuracy/peer0") == [25]
    stored = optuna.load_study(study_name="wml-alpha", storage="sqlite:///optuna.db").trials
    assert [trial.state.name for trial in stored] == ["COMPLETE"] * 4
    assert not list(folder.parent.glob(".ray/*"))


def test_after_sigterm_the_same_command_continues_a_study(workplace):
    config = tiny_config("optim.epochs=40", "scale.cpus_per_worker=1")
    write_study(workplace, config)
    folder = Path("results/wml-alpha")
    process = start_tune()
    while not list(folder.glob("trials/*/*/checkpoints/epoch-0002")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert "the same command continues" in end(process, signal.SIGTERM)
    assert {run.info.status for run in [parent("wml-alpha"), *children("wml-alpha")]} == {"KILLED"}
    assert not (folder / LEASE_FILE).exists()
    process = start_tune("--trials", "1")
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert [run.info.status for run in children("wml-alpha") if run.data.metrics] == ["FINISHED"] * 2


def start_tune(*more):
    command = [sys.executable, "-m", "wml_ray", "tune", "c.yaml", "--space", "alpha.py", "--trials", "4"]
    command += ["--scheduler", "none", "--storage", "sqlite:///optuna.db", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_command_is_refused_while_a_study_runs(workplace, ray_cluster):
    def again(study):
        with pytest.raises(UserError, match="in use by process"):
            tune(small_space(), SearchConfig(study="two", trials=1))

    tune(small_space(), SearchConfig(study="two", trials=1), again)


def test_a_report_of_an_experiment_without_a_study_says_so(empty_workplace):
    with pytest.raises(UserError, match=r"mlflow\.db does not exist"):
        load_study("nothing")


@pytest.mark.nightly
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("job", sorted((TESTS.parent / "jobs").glob("0*.py")), ids=lambda path: path.stem)
def test_every_numbered_job_runs_as_many_trials_as_asked(workplace, capsys, monkeypatch, job):
    monkeypatch.setattr(sys, "argv", [str(job), "--trials", "2", "optim.epochs=1"])
    runpy.run_path(str(job), run_name="__main__")
    studies = [path.parent for path in Path("results").glob("*/study.json")]
    assert studies
    for study in studies:
        assert [trial.state for trial in TrialStore(study).trials()] == ["COMPLETE", "COMPLETE"]
    assert "2 of 2 trials done" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_cluster")
def test_a_study_in_postgresql_equals_its_trial_files_after_a_restart_of_the_database(workplace):
    with postgres() as database:
        restarted = []

        def restart(study):
            if study.trials[0].epochs == 2 and not restarted:
                database.kill()
                database.start()
                restarted.append(True)

        search = SearchConfig(study="shared", trials=3, storage=database.url, scheduler="none")
        tune(small_space(), search, restart)
        assert restarted
        stored = optuna.load_study(study_name="shared", storage=database.url)
        assert [trial.state.name for trial in stored.trials] == ["COMPLETE"] * 3
        store = TrialStore(Path("results/shared")).trials()
        assert [trial.params for trial in stored.trials] == [trial.point for trial in store]
        accuracies = [trial.results()["val/accuracy/ensemble_weighted"] for trial in store]
        assert [trial.value for trial in stored.trials] == accuracies
        secret = database.password
    texts = [
        path.read_text(errors="replace") for path in workplace.rglob("*") if path.is_file() and path.suffix != ".png"
    ]
    assert not [text for text in texts if secret in text], "a file contains the password of the database"


@pytest.mark.usefixtures("ray_cluster")
def test_an_unreachable_database_ends_the_study_and_fails_no_trial(workplace, monkeypatch):
    monkeypatch.setattr("wml_ray.search.optuna_study.DATABASE_TIMEOUT_S", 1.0)
    # with two objectives Optuna is called only at the end of a trial
    space = small_space(objectives={**ACCURACY, "peers/macs/tree": "min"})
    with postgres() as database:
        search = SearchConfig(study="gone", trials=2, storage=database.url, scheduler="none", concurrent=1)

        def kill(study):
            if study.trials[0].epochs == 2 and (database.data / "postmaster.pid").exists():
                database.kill()
                (database.data / "postmaster.pid").unlink()

        with pytest.raises(StorageUnavailable, match=r"storage .* does not respond .* run the same command again"):
            tune(space, search, kill)
        (finished,) = TrialStore(Path("results/gone")).trials()
        assert finished.state == "COMPLETE"
        database.start()
        tune(space, search)
        stored = optuna.load_study(study_name="gone", storage=database.url)
        assert [trial.state.name for trial in stored.trials] == ["COMPLETE"] * 2
    assert TrialStore(Path("results/gone")).trials()[0].history == finished.history
    assert [run.info.status for run in children("gone")] == ["FINISHED"] * 2


def test_stopped_trials_of_two_workers_free_their_slots(workplace, ray_cluster):
    """Four trials on two cores, each with both; every second one is stopped early."""
    domains = {"optim.learning_rate": ray_tune_api.choice([0.1, 1e-6])}
    start = [{"optim.learning_rate": rate} for rate in (0.1, 1e-6, 0.1, 1e-6)]
    space = small_space("scale.workers=2", "optim.epochs=4", domains=domains)
    running = []

    def count(study):
        running.append(study.counts()["RUNNING"])

    result = tune(space, SearchConfig(study="pairs", trials=4, reduction_factor=2), count, start)
    assert max(running) == 1
    assert list(result.study.trials["state"]) == ["COMPLETE", "STOPPED"] * 2
    for run in children("pairs")[::2]:
        assert steps(run, "train/loss") == [1, 2, 3, 4]


def test_a_killed_trial_of_two_workers_frees_their_slots_for_its_restart(workplace, ray_cluster):
    killed = []

    def kill_once(study):
        if study.trials[0].epochs == 2 and not killed:
            killed.append(max(trial_processes(study, 0)))
            os.kill(killed[0], signal.SIGKILL)

    space = small_space("scale.workers=2", "optim.epochs=4")
    result = tune(space, SearchConfig(study="pair", trials=1, scheduler="none"), kill_once)
    assert killed
    assert list(result.study.trials["state"]) == ["COMPLETE"]
    assert steps(children("pair")[0], "train/loss") == [1, 2, 3, 4]


@pytest.mark.usefixtures("ray_cluster")
def test_with_test_epoch_best_the_report_has_the_metrics_of_the_best_epoch(workplace):
    """Also with trials that were stopped early, which have no tested epoch."""
    domains = {"optim.learning_rate": ray_tune_api.choice([0.1, 1e-6])}
    start = [{"optim.learning_rate": rate} for rate in (0.1, 1e-6)]
    space = small_space("run.test_epoch=best", "optim.epochs=4", domains=domains)
    search = SearchConfig(study="best", trials=2, reduction_factor=2, concurrent=1)
    trials = tune(space, search, None, start).study.trials
    assert list(trials["state"]) == ["COMPLETE", "STOPPED"]
    history = TrialStore(Path("results/best")).trials()[0].history
    scores = [entry["metrics"]["val/accuracy/ensemble_weighted"] for entry in history]
    assert trials["val/accuracy/ensemble_weighted"][0] == max(scores)
