"""Whole studies: Ray Tune, Optuna and MLflow for real, drivers and trials killed with real signals."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pandas as pd
import pytest
from family import tiny_config, write_study
from mlflow import MlflowClient
from postgres import postgres
from ray import tune as ray_tune_api
from servers import free_port
from studies import ACCURACY, ALPHA, children, small_space

from wml_ray.cli.main import main
from wml_ray.cluster.schedulers import EarlierTrial, make_scheduler, replay
from wml_ray.cluster.trial import train_trial
from wml_ray.config.load import load_config
from wml_ray.errors import UserError
from wml_ray.search.optuna_study import open_storage
from wml_ray.search.settings import search_config
from wml_ray.search.space import load_start_points
from wml_ray.search.study import DIED, Study
from wml_ray.search.trials import Trial, TrialStore
from wml_ray.storage.retry import StorageUnavailable
from wml_ray.tracking.results import load_study
from wml_ray.tracking.runs import open_run
from wml_ray.verbs.tune import tune

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def client():
    return MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")


def parent(study):
    experiment = client().get_experiment_by_name(study).experiment_id
    (run,) = client().search_runs([experiment], "tags.`wml_ray.kind` = 'study'")
    return run


def steps(run, metric):
    return [entry.step for entry in client().get_metric_history(run.info.run_id, metric)]


@pytest.mark.core
@pytest.mark.usefixtures("ray_cluster")
def test_a_study_is_whole_in_mlflow(workplace):
    """Parent and children, params and metrics, tags and files; and the best config is one that `train` takes."""
    search = search_config(study="whole", trials=3, grace_epochs=3)  # ASHA, which ends trials at their last epoch
    outcome = tune(small_space(), search)
    runs = children("whole")
    assert [run.info.run_name for run in runs] == ["trial 0", "trial 1", "trial 2"]
    for run in runs:
        assert run.data.tags["wml_ray.state"] == "COMPLETE"
        assert run.info.status == "FINISHED"
        assert "run.storage_path" in run.data.params
        for metric in ("train/loss", "val/accuracy/peer3", "val/accuracy/smallest_peer", "weights/peer0"):
            assert steps(run, metric) == [1, 2, 3]
        for metric in ("test/accuracy/peer0", "test/accuracy/ensemble_average", "peers/latency_ms/peer3"):
            assert steps(run, metric) == [3]
        assert steps(run, "peers/macs/tree") == [0]
        files = {file.path for file in client().list_artifacts(run.info.run_id)}
        assert files == {"config.yaml", "peers.csv", "pictures"}
    study_run = parent("whole")
    assert study_run.info.status == "FINISHED"
    assert study_run.data.params["space.wml.alpha"] == "0.0 to 0.9"
    assert study_run.data.params["objective.val/accuracy/ensemble_weighted"] == "max"
    assert study_run.data.params["search.scheduler"] == "asha"
    best = outcome.study.trials.sort_values("val/accuracy/ensemble_weighted").iloc[-1]
    taken = load_config(client().download_artifacts(study_run.info.run_id, "config.yaml", str(workplace)))
    assert taken.wml.alpha == best["wml.alpha"]
    assert (taken.run.name, taken.run.storage_path) == ("wml", "results")
    report = {file.path for file in client().list_artifacts(study_run.info.run_id, "report")}
    assert {"report/report.html", "report/history.png", "report/trials.csv"} <= report


@pytest.mark.usefixtures("ray_cluster")
def test_more_trials_add_the_difference_and_fewer_add_none(workplace):
    tune(small_space(), search_config(study="grows", trials=2))
    before = {path: path.read_bytes() for path in Path("results/grows/trials").glob("*/trial.json")}
    assert tune(small_space(), search_config(study="grows", trials=3)).trained_now
    assert not tune(small_space(), search_config(study="grows", trials=1)).trained_now
    assert {path: path.read_bytes() for path in before} == before
    assert [run.data.tags["wml_ray.trial"] for run in children("grows")] == ["0", "1", "2"]
    assert len({run.data.params["wml.alpha"] for run in children("grows")}) == 3


@pytest.mark.usefixtures("ray_cluster")
def test_another_space_or_config_does_not_continue_a_study(workplace):
    tune(small_space(), search_config(study="same", trials=1))
    for other in (
        small_space("wml.temperature=2"),
        small_space(domains={"wml.alpha": ray_tune_api.uniform(0.0, 0.5)}),
        small_space(objectives={"val/accuracy/peer0": "max"}),
    ):
        with pytest.raises(UserError, match="was begun with another"):
            tune(other, search_config(study="same", trials=2))
    tune(small_space("run.name=moved", "scale.max_failures=1"), search_config(study="same", trials=1))


@pytest.mark.usefixtures("ray_cluster")
def test_trials_that_diverge_or_die_are_failed_everywhere_and_never_best(workplace):
    """Trial 0 diverges, trial 1 is killed with no restart allowed, the others go on."""
    domains = {"optim.learning_rate": ray_tune_api.choice([0.05, 0.1, 1e30])}
    space = small_space("scale.max_failures=0", "optim.schedule=constant", "optim.epochs=20", domains=domains)
    killed = []

    def kill_trial_1(sweep):
        if len(sweep.trials) > 1 and sweep.trials[1].epochs == 2 and not killed:
            killed.append(max(trial_processes(sweep, 1)))
            os.kill(killed[0], signal.SIGKILL)

    start = [{"optim.learning_rate": 1e30}, {"optim.learning_rate": 0.05}]
    search = search_config(
        study="bad", trials=4, scheduler="none", storage="sqlite:///bad.db", sampler="random", concurrent=1
    )
    outcome = tune(space, search, kill_trial_1, start)
    trials = outcome.study.trials.set_index("trial")
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


def trial_processes(sweep, number):
    """Processes of this machine that work in the folder of a trial."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"trial-{number:04d}-" in os.readlink(folder / "cwd"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.core
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_trial_goes_on_from_its_checkpoint(workplace):
    killed = []

    def kill_once(sweep):
        if sweep.trials[0].epochs == 5 and not killed:
            killed.append(max(trial_processes(sweep, 0)))
            killed.append([entry["timestamp_ms"] for entry in sweep.trials[0].history])
            os.kill(killed[0], signal.SIGKILL)

    tune(small_space("optim.epochs=12"), search_config(study="once", trials=1, scheduler="none"), kill_once)
    (trial,) = TrialStore(Path("results/once")).trials()
    assert trial.state == "COMPLETE"
    assert [entry["timestamp_ms"] for entry in trial.history][:5] == killed[1]
    assert steps(children("once")[0], "train/loss") == list(range(1, 13))


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_dies_between_two_trials_fails_neither(workplace):
    """Ray Tune keeps it for the next trial, and tells its death twice."""
    killed = []

    def kill_once(sweep):
        if sweep.counts()["COMPLETE"] == 1 and not killed:
            killed.append(max(trial_processes(sweep, 0)))
            os.kill(killed[0], signal.SIGKILL)

    tune(small_space(), search_config(study="between", trials=3, scheduler="none", concurrent=1), kill_once)
    assert killed
    assert [trial.state for trial in TrialStore(Path("results/between")).trials()] == ["COMPLETE"] * 3
    assert [run.info.status for run in children("between")] == ["FINISHED"] * 3


@pytest.mark.usefixtures("ray_cluster")
def test_a_storage_that_stays_away_ends_the_study_and_fails_no_trial(workplace, monkeypatch):
    def out_of_storage(settings, worker_environment):
        def run_worker(*_):
            raise StorageUnavailable("the storage does not answer")

        run_worker = run_worker
        train_trial(settings, worker_environment)

    monkeypatch.setattr("wml_ray.cluster.tune.train_trial", out_of_storage)
    with pytest.raises(UserError, match=r"^the storage does not answer$"):
        tune(small_space(), search_config(study="away", trials=2, scheduler="none"))
    assert {trial.state for trial in TrialStore(Path("results/away")).trials()} == {"RUNNING"}
    assert {run.info.status for run in [parent("away"), *children("away")]} <= {"FAILED", "KILLED"}


@pytest.mark.usefixtures("ray_cluster")
def test_the_scheduler_stops_bad_trials_whose_checkpoints_go(workplace):
    domains = {"optim.learning_rate": ray_tune_api.choice([0.1, 1e-6])}
    start = [{"optim.learning_rate": rate} for rate in (0.1, 0.1, 0.1, 1e-6)]
    search = search_config(study="stops", trials=4, scheduler="median", grace_epochs=2, storage="sqlite:///stops.db")
    outcome = tune(
        small_space("optim.epochs=6", domains=domains), search.model_copy(update={"concurrent": 1}), None, start
    )
    trials = outcome.study.trials
    assert list(trials["state"]) == ["COMPLETE"] * 3 + ["STOPPED"]
    assert trials["epochs"][3] < 6
    assert children("stops")[3].data.tags["wml_ray.reason"] == f"stopped early after epoch {trials['epochs'][3]}"
    assert not list(Path("results/stops/trials/0003").glob("*/checkpoints"))
    assert len(list(Path("results/stops/trials/0000").glob("*/checkpoints/*"))) <= 3
    states = [trial.state.name for trial in optuna.load_study(study_name="stops", storage="sqlite:///stops.db").trials]
    assert states == ["COMPLETE"] * 3 + ["PRUNED"]


@pytest.mark.usefixtures("ray_cluster")
def test_an_earlier_study_is_learnt_from(workplace):
    tune(small_space(), search_config(study="first", trials=2, scheduler="none"))
    search = search_config(study="second", trials=1, storage="sqlite:///second.db")
    tune(small_space(), search, warm_start=["first"])
    stored = optuna.load_study(study_name="second", storage="sqlite:///second.db").trials
    first = [trial.point for trial in TrialStore(Path("results/first")).trials()]
    assert [trial.params for trial in stored[:2]] == first
    assert len(stored) == 3
    with pytest.raises(UserError, match=r"holds no study|is not on"):
        tune(small_space(), search_config(study="third", trials=1), warm_start=["never"])


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "sampler", ["tpe", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("nsga2", "random"))]
)
def test_several_objectives_with_every_sampler_and_asha(workplace, capsys, sampler):
    objectives = {"val/accuracy/smallest_peer": "max", "peers/macs/tree": "min", "peers/latency_ms/peer0": "min"}
    domains = {"pruning.ratios.3": ray_tune_api.uniform(0.0, 0.3), **ALPHA}
    outcome = tune(
        small_space(domains=domains, objectives=objectives), search_config(study="many", trials=3, sampler=sampler)
    )
    complete = outcome.study.trials[outcome.study.trials["state"] == "COMPLETE"]
    assert complete[list(objectives)].notna().all(axis=None)
    assert main(["report", "many", "--csv"]) == 0
    lines = capsys.readouterr().out
    (workplace / "out.csv").write_text(lines)
    table = pd.read_csv("out.csv")
    assert list(table["trial"]) == [0, 1, 2]
    assert table["wml.alpha"].tolist() == pytest.approx(outcome.study.trials["wml.alpha"].tolist())


@pytest.mark.core
def test_a_driver_killed_at_any_moment_is_continued_by_the_same_command(workplace):
    """Killed twice: once while the first trials train, once after some are finished."""
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
    out, errors = process.communicate(timeout=300)
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


def start_tune():
    command = [sys.executable, "-m", "wml_ray", "tune", "c.yaml", "--space", "alpha.py", "--trials", "4"]
    command += ["--scheduler", "none", "--storage", "sqlite:///optuna.db"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_scheduler_remembers_what_earlier_trials_reached(workplace):
    space, search = small_space("optim.epochs=9"), search_config(study="asha", trials=9, grace_epochs=1)
    ledger = TrialStore(workplace / "asha")
    for number, last in enumerate([9, 3, 1, 9]):
        history = [
            {"epoch": e, "timestamp_ms": 0, "metrics": {search.stop_metric: number / 10}} for e in range(1, last + 1)
        ]
        ledger.write(Trial(number, {"wml.alpha": 0.1}, "STOPPED", history=history))
    scheduler = make_scheduler(search, space, set())
    replay(scheduler, Study(space, search, workplace / "asha", "token"))
    rungs = {milestone: len(recorded) for milestone, recorded in scheduler._brackets[0]._rungs}
    assert rungs == {1: 4, 3: 3, 9: 2}


def test_an_interrupted_study_closes_the_runs_of_its_trials_though_some_have_none_yet(workplace):
    sweep = Study(small_space(), search_config(study="halted", trials=2), workplace / "halted", "token")
    sweep.publish_to(open_run("halted", "halted", "token", {}, {}))
    _, started = (sweep.begin({"wml.alpha": alpha}, {}) for alpha in (0.1, 0.2))
    sweep.started(started)
    assert sweep.running() == [started]
    sweep.interrupted()
    assert sweep.close(2.0) == 0
    (run,) = children("halted")
    assert (run.data.tags["wml_ray.trial"], run.info.status) == (str(started.number), "KILLED")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- wml.alpha: 0.95", "outside the space"),
        ("- wml.alpa: 0.5", "is not searched"),
        ("wml.alpha: 1", "must be a YAML list"),
    ],
)
def test_a_start_point_outside_the_space_is_refused(workplace, text, says):
    (workplace / "start.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        load_start_points(Path("start.yaml"), small_space())


def test_two_commands_do_not_run_one_study(workplace, ray_cluster):
    def again(sweep):
        with pytest.raises(UserError, match="in use by another process"):
            tune(small_space(), search_config(study="two", trials=1))

    tune(small_space(), search_config(study="two", trials=1), again)


def test_a_report_of_an_experiment_without_a_study_says_so(workplace):
    with pytest.raises(UserError, match=r"there is no .*mlflow\.db"):
        load_study("nothing")


@pytest.mark.nightly
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("job", sorted((TESTS.parent / "jobs").glob("0*.py")), ids=lambda path: path.stem)
def test_every_numbered_job_runs(workplace, capsys, job):
    outcome = runpy.run_path(str(job))["main"](["optim.epochs=1"], trials=2)
    assert list(outcome.study.trials["state"]) == ["COMPLETE", "COMPLETE"]
    assert capsys.readouterr().out


@pytest.mark.usefixtures("ray_cluster")
def test_a_study_in_postgresql_outlives_the_restart_of_its_database(workplace):
    """What others see there is what the ledger has, although the server died in the middle."""
    with postgres() as database:
        restarted = []

        def restart(sweep):
            if sweep.trials[0].epochs == 2 and not restarted:
                database.kill()
                database.start()
                restarted.append(True)

        search = search_config(study="shared", trials=3, storage=database.url, scheduler="none")
        tune(small_space(), search, restart)
        assert restarted
        stored = optuna.load_study(study_name="shared", storage=database.url)
        assert [trial.state.name for trial in stored.trials] == ["COMPLETE"] * 3
        ledger = TrialStore(Path("results/shared")).trials()
        assert [trial.params for trial in stored.trials] == [trial.point for trial in ledger]
        accuracies = [trial.results()["val/accuracy/ensemble_weighted"] for trial in ledger]
        assert [trial.value for trial in stored.trials] == accuracies
        secret = database.password
    said = [
        path.read_text(errors="replace") for path in workplace.rglob("*") if path.is_file() and path.suffix != ".png"
    ]
    assert not [text for text in said if secret in text], "the database's password was written down"


@pytest.mark.usefixtures("ray_cluster")
def test_a_database_that_stays_away_ends_the_study_and_fails_no_trial(workplace, monkeypatch):
    monkeypatch.setattr("wml_ray.cluster.tune.STORAGE_TIMEOUT_S", 1.0)
    space = small_space(objectives={**ACCURACY, "peers/macs/tree": "min"})  # Optuna hears of a trial at its end
    with postgres() as database:
        search = search_config(study="gone", trials=2, storage=database.url, scheduler="none", concurrent=1)

        def kill(sweep):
            if sweep.trials[0].epochs == 2 and (database.data / "postmaster.pid").exists():
                database.kill()
                (database.data / "postmaster.pid").unlink()

        with pytest.raises(UserError, match=r"storage .* does not answer .* run the same command again"):
            tune(space, search, kill)
        (finished,) = TrialStore(Path("results/gone")).trials()
        assert finished.state == "COMPLETE"
        database.start()
        tune(space, search)
        stored = optuna.load_study(study_name="gone", storage=database.url)
        assert [trial.state.name for trial in stored.trials] == ["COMPLETE"] * 2
    assert TrialStore(Path("results/gone")).trials()[0].history == finished.history
    assert [run.info.status for run in children("gone")] == ["FINISHED"] * 2


def test_a_storage_that_does_not_open_is_one_line_without_its_password(workplace):
    address = f"postgresql+psycopg://someone:secret@127.0.0.1:{free_port()}/nothing"
    with pytest.raises(UserError, match=r"storage 'postgresql\+psycopg://127.0.0.1:") as raised:
        open_storage(address, "study", None)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_trials_of_two_workers_on_a_cluster_for_one_of_them_never_wait_for_ever(workplace, ray_cluster):
    """Six trials, those with a poor learning rate stopped early; each has both cores, so each had to be given back."""
    domains = {"optim.learning_rate": ray_tune_api.choice([0.1, 1e-6])}
    start = [{"optim.learning_rate": rate} for rate in (0.1, 1e-6, 0.1, 1e-6, 0.1, 1e-6)]
    space = small_space("scale.workers=2", "optim.epochs=4", domains=domains)
    running = []

    def count(sweep):
        running.append(sweep.counts()["RUNNING"])

    outcome = tune(space, search_config(study="pairs", trials=6, reduction_factor=2), count, start)
    assert max(running) == 1
    assert list(outcome.study.trials["state"]) == ["COMPLETE", "STOPPED"] * 3
    for run in children("pairs")[::2]:
        assert steps(run, "train/loss") == [1, 2, 3, 4]


def test_a_killed_trial_of_two_workers_gives_their_places_to_its_next_start(workplace, ray_cluster):
    killed = []

    def kill_once(sweep):
        if sweep.trials[0].epochs == 2 and not killed:
            killed.append(max(trial_processes(sweep, 0)))
            os.kill(killed[0], signal.SIGKILL)

    space = small_space("scale.workers=2", "optim.epochs=4")
    outcome = tune(space, search_config(study="pair", trials=1, scheduler="none"), kill_once)
    assert killed
    assert list(outcome.study.trials["state"]) == ["COMPLETE"]
    assert steps(children("pair")[0], "train/loss") == [1, 2, 3, 4]


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_a_continued_scheduler_stops_bad_trials_but_none_for_its_past(workplace, scheduler):
    """Trials of an earlier start set the mark; one that was interrupted behind them reports its past unharmed."""
    space = small_space("optim.epochs=9")
    search = search_config(study="again", trials=9, scheduler=scheduler)
    ledger = TrialStore(workplace / "again")
    for number in range(4):
        history = [{"epoch": e, "timestamp_ms": 0, "metrics": {search.stop_metric: 0.9}} for e in range(1, 10)]
        ledger.write(Trial(number, {"wml.alpha": 0.1}, "STOPPED", history=history))
    stopped = set()
    continued = make_scheduler(search, space, stopped)
    replay(continued, Study(space, search, workplace / "again", "token"))
    interrupted, new = EarlierTrial("interrupted"), EarlierTrial("new")
    for trial, past in ((interrupted, True), (new, False)):
        continued.on_trial_add(None, trial)
        results = [{"epoch": e, "past": past, search.stop_metric: 0.1} for e in (1, 2, 3)]
        assert any(continued.on_trial_result(None, trial, result) == "STOP" for result in results) == (trial == new)
    assert stopped == {"new"}


@pytest.mark.usefixtures("ray_cluster")
def test_the_best_epoch_counts_where_the_config_says_so(workplace):
    """Also beside trials that were stopped early, which have no tested epoch."""
    domains = {"optim.learning_rate": ray_tune_api.choice([0.1, 1e-6])}
    start = [{"optim.learning_rate": rate} for rate in (0.1, 1e-6)]
    space = small_space("run.test_epoch=best", "optim.epochs=4", domains=domains)
    search = search_config(study="best", trials=2, reduction_factor=2, concurrent=1)
    trials = tune(space, search, None, start).study.trials
    assert list(trials["state"]) == ["COMPLETE", "STOPPED"]
    history = TrialStore(Path("results/best")).trials()[0].history
    scores = [entry["metrics"]["val/accuracy/ensemble_weighted"] for entry in history]
    assert trials["val/accuracy/ensemble_weighted"][0] == max(scores)


@pytest.mark.usefixtures("ray_cluster")
def test_a_storage_that_holds_the_study_of_others_is_refused(workplace):
    tune(small_space(), search_config(study="mine", trials=1, storage="sqlite:///shared.db"))
    with pytest.raises(UserError, match="holds another study named 'mine'"):
        tune(
            small_space("run.storage_path=elsewhere"),
            search_config(study="mine", trials=1, storage="sqlite:///shared.db"),
        )
