"""Nodes, workers, drivers, heads and servers that die cost time, but nothing that was trained or logged."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from deadline import DEADLINE_S
from family import tiny_config, write_study
from head import Head
from mlflow import MlflowClient
from nodes import kill_family, nodes
from postgres import postgres
from runs import ignore
from servers import OUTAGE_S, Server
from witness import Place

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.cluster.space import load_space
from wml_ray.config.load import load_config
from wml_ray.config.title import run_title
from wml_ray.errors import UserError
from wml_ray.search.settings import SearchConfig
from wml_ray.search.trials import TrialStore
from wml_ray.storage.retry import RetryQueue
from wml_ray.tracking.client import check_reachable, tracking_uri
from wml_ray.tracking.runs import UNREACHABLE, MetricLogger, finish_run, open_run
from wml_ray.training.trainer import STEPS_BETWEEN_PREEMPTION_CHECKS
from wml_ray.verbs import tune as tune_verb
from wml_ray.verbs.train import train
from wml_ray.verbs.tune import check_ratios, tune

pytestmark = pytest.mark.nightly

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
METRICS = ("train/loss", "val/accuracy/peer3", "weights/peer0")


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    """One tracking server for all tests: it takes long to start."""
    server = Server(tmp_path_factory.mktemp("server"))
    start_again(server)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def one_cluster():
    with nodes() as cluster:
        yield cluster


@pytest.fixture
def two_nodes(one_cluster):
    one_cluster.have(2)
    return one_cluster


@pytest.fixture
def server(one_server, workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one_server.uri)
    return one_server


def logged(experiment):
    """Status and steps of METRICS of each run in an experiment, by name."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    names = [run.info.run_name for run in runs]
    assert len(names) == len(set(names)), names
    return {
        run.info.run_name: (
            run.info.status,
            [[entry.step for entry in client.get_metric_history(run.info.run_id, name)] for name in METRICS],
        )
        for run in runs
    }


def whole(epochs):
    """The entry of `logged` for a finished run with every epoch once."""
    return "FINISHED", [list(range(1, epochs + 1))] * len(METRICS)


def start(*words, **environment):
    """`python -m ...` in a process of its own."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, timeout_s=DEADLINE_S):
    """Output of a process, after it ended with exit code 0."""
    out, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, out + errors
    return out + errors


def wait_until(true, process):
    deadline_s = time.monotonic() + DEADLINE_S
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_an_elastic_run_that_loses_and_gains_nodes_in_mid_epoch_gives_the_same_result(server, two_nodes, workplace):
    """Two nodes, then one, then three. The node with the driver's queue is killed, if it is on a node of workers."""
    overrides = ["optim.epochs=8", "optim.sync_batchnorm=true", "scale.cpus_per_worker=1"]
    undisturbed = train(tiny_config(*overrides, "run.name=undisturbed"), ignore).record
    config = tiny_config(*overrides, "scale.workers=[1,4]", "run.name=elastic")
    (workplace / "c.yaml").write_text(config.to_yaml())
    place = Place("results")
    lost, *_ = (place.close_gate(*at) for at in ((3, 2), (6, 1), (6, 2)))  # the latter open for three workers
    process = start("witness", "train", "c.yaml", **two_nodes.environment())
    wait_until(lambda: len(place.waiting(3, 2)) == 2, process)
    two_nodes.kill(next(iter(two_nodes.hosts("ray::_QueueActor")), 0))
    lost.unlink()
    wait_until(lambda: len(place.waiting(6, 1)) == 1, process)
    two_nodes.add()
    two_nodes.add()
    output = ended(process)
    assert "Traceback" not in output
    workers, digests = defaultdict(set), defaultdict(set)
    for line in place.seen():
        workers[line["epoch"]].add((line["workers"], line["rank"]))
        digests[line["epoch"]].add(line["digest"])
    expected = [2, 2, 1, 1, 1, 3, 3, 3]
    assert [workers[epoch] for epoch in range(1, 9)] == [{(n, rank) for rank in range(n)} for n in expected]
    assert all(len(found) == 1 for found in digests.values()), "the ranks differ"
    assert logged("elastic") == {run_title(config): whole(8)}
    elastic = json.loads((config.run_folder / "result.json").read_text())
    for metric, tolerance in (("train/learning_rate", 0), ("train/loss", 1e-3), ("weights/peer3", 1e-3)):
        ours, theirs = ([entry["metrics"][metric] for entry in result["history"]] for result in (elastic, undisturbed))
        assert ours == pytest.approx(theirs, rel=tolerance), metric


FOLLOW = """
import sys
from wml_ray.cli.main import main
from wml_ray.submit import jobs
jobs.UNREACHABLE_S = 2
sys.exit(main(["submit", *sys.argv[1:]]))
"""


def test_a_job_continues_after_the_death_of_its_driver_and_of_its_head(server, workplace):
    """The driver is killed and the job submitted again; then the head is killed and a new one continues."""
    words = [str(ROOT / "jobs" / "quickstart.yaml"), "pruning.saliency_images=32", "data.batch_size=256"]
    words += ["optim.epochs=24", "scale.workers=1", "run.name=outlives"]
    config = load_config(words[0], words[1:])
    checkpoints = Checkpoints(config.run_folder / "checkpoints", 2)
    name, tracked = config.run_id, {"MLFLOW_TRACKING_URI": server.uri}

    def reached(epoch):
        return lambda: bool(checkpoints.epochs()) and checkpoints.epochs()[-1] >= epoch

    with head_of_jobs(workplace / "first") as head:
        assert head.run("submit", "train", *words, "--detach", folder=workplace, **tracked).returncode == 0
        wait_until(reached(2), head.process)
        for process in psutil.Process(head.process.pid).children(recursive=True):
            if "wml_ray.cli.job" in process.cmdline() and "python" in process.name():
                process.kill()
        wait_until(lambda: f"job         {name} FAILED" in head.run("jobs", "status", name).stdout, head.process)
        done_before = checkpoints.latest().epoch
        follower = [sys.executable, "-c", FOLLOW, "train", *words]
        process = subprocess.Popen(
            [*follower, "--address", head.url],
            cwd=workplace,
            env=head.environment(**tracked, PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(reached(done_before + 2), process)
    out, errors = process.communicate(timeout=DEADLINE_S)
    assert f"job         {name}-2 on" in out
    assert process.returncode == 2
    assert f"checkpoints and results stay in {config.run_folder}" in errors
    done_before = checkpoints.latest().epoch
    before = checkpoints.latest().metadata["history"]
    assert done_before < 24
    with head_of_jobs(workplace / "second") as head:
        again = head.run("submit", "train", *words, folder=workplace, **tracked)
    assert again.returncode == 0, again.stdout + again.stderr
    assert checkpoints.latest().metadata["history"][:done_before] == before
    assert logged("outlives") == {run_title(config): whole(24)}


@contextmanager
def head_of_jobs(folder):
    """A head with a job server, whose processes are all killed at once in the end, as by a power cut."""
    head = Head(folder)
    try:
        head.wait()
        yield head
    finally:
        kill_family(psutil.Process(head.process.pid))
        head.stop()


TUNE = ("wml_ray", "tune", "c.yaml", "--space", "alpha.py", "--scheduler", "none", "--trials")


def trial_plans(study):
    """The newest checkpoint's plan of each trial."""
    found = {}
    for path in sorted(Path("results", study, "trials").glob("*/*/checkpoints/epoch-*/plan.json")):
        found[int(path.parts[3])] = json.loads(path.read_text())
    return found


def assert_whole(study, trials, epochs):
    """Every trial file is COMPLETE and delivered, and MLflow has each epoch once."""
    stored = TrialStore(Path("results", study)).trials()
    assert [(trial.number, trial.state, trial.delivered) for trial in stored] == [
        (number, "COMPLETE", True) for number in range(trials)
    ]
    runs = logged(study)
    assert runs.pop(study)[0] == "FINISHED"
    assert runs == {f"trial {number}": whole(epochs) for number in range(trials)}
    return stored


def test_a_study_that_loses_a_node_loses_no_epoch_that_had_a_checkpoint(server, two_nodes, workplace):
    write_study(workplace, tiny_config("optim.epochs=40", "scale.cpus_per_worker=1", "run.name=lossy"))
    process = start(*TUNE, "3", **two_nodes.environment())
    plans = {}

    def both_train():
        plans.update(trial_plans("lossy-alpha"))
        return len(plans) >= 2 and min(plan["epoch"] for plan in plans.values()) >= 4

    wait_until(both_train, process)
    two_nodes.kill(0)
    ended(process)
    for trial in assert_whole("lossy-alpha", 3, 40):
        kept = plans.get(trial.number, {"history": []})["history"]
        assert trial.history[: len(kept)] == kept
        assert [entry["epoch"] for entry in trial.history] == list(range(1, 41))


@pytest.mark.parametrize(
    ("words", "process_name"),
    [
        (("train", "c.yaml", "scale.workers=1"), "ray::RayTrainWorker"),
        (("tune", "c.yaml", "--space", "alpha.py", "--trials", "1"), "ray::ResourceTrainable"),
    ],
    ids=["run", "trial"],
)
def test_training_on_a_preempted_node_continues_in_the_middle_of_its_epoch(
    words, process_name, server, two_nodes, workplace
):
    """The node is killed once it has written the checkpoint that the notice calls for; the next one resumes there."""
    write_study(
        workplace, tiny_config("optim.epochs=2", "data.batch_size=2", "scale.cpus_per_worker=1", "run.name=spot")
    )
    place = Place("results")
    place.await_notice()
    process = start("witness", *words, **two_nodes.environment(RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1"))
    wait_until(place.begun, process)
    (machine,) = two_nodes.hosts(process_name)
    two_nodes.announce_preemption(machine, seconds=120)
    wait_until(lambda: any(Path("results").glob("**/partial/epoch-*")), process)
    two_nodes.kill(machine)
    ended(process)
    first, (epoch, step) = place.begun()
    assert (first, epoch) == ((0, 0), 0)
    assert step >= STEPS_BETWEEN_PREEMPTION_CHECKS
    assert whole(2) in logged("spot" if words[0] == "train" else "spot-alpha").values()


def test_eight_trials_that_log_at_once_to_mlflow_on_postgresql_lose_nothing(workplace, monkeypatch):
    """Also when the database is killed meanwhile, and recovers."""
    with postgres() as database:
        server = Server(workplace, database.url)
        server.start()
        try:
            server.wait()
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
            spawn = multiprocessing.get_context("spawn")
            together, logging = spawn.Barrier(8), spawn.Semaphore(0)
            trials = [spawn.Process(target=log_a_trial, args=(number, together, logging)) for number in range(8)]
            for trial in trials:
                trial.start()
            for _ in trials:
                assert logging.acquire(timeout=DEADLINE_S)
            database.kill()
            database.start()
            for trial in trials:
                trial.join(DEADLINE_S)
            assert [trial.exitcode for trial in trials] == [0] * 8
            assert logged("eight") == {f"trial {number}": whole(50) for number in range(8)}
        finally:
            server.kill()


def log_a_trial(number, together, logging):
    """Log as a training process does. All eight create the experiment and log at the same time."""
    check_reachable(tracking_uri())
    together.wait(DEADLINE_S)
    tracked = open_run("eight", f"trial {number}", f"token {number}", {"seed": number})
    tracker = MetricLogger(tracked)
    for step in range(1, 51):
        tracker.log(step, dict.fromkeys(METRICS, step / (number + 1)), step)
    logging.release()
    assert tracker.close(DEADLINE_S) == 0
    last = RetryQueue(UNREACHABLE)
    last.put(lambda: finish_run(tracked, "FINISHED"))
    assert last.close(DEADLINE_S) == 0


@pytest.mark.usefixtures("ray_cluster")
def test_a_study_delivers_everything_to_a_server_that_hangs_and_to_one_that_dies(server, workplace):
    """The server hangs as trial 1 is logged and is killed in trial 2, each for the length of an outage."""
    write_study(workplace, tiny_config("optim.epochs=25", "scale.cpus_per_worker=1", "run.name=outage"))
    pending = []

    def later(seconds, call):
        pending.append(threading.Timer(seconds, call))
        pending[-1].start()

    def break_server(sweep):
        if not pending and len(sweep.trials) > 1:
            server.signal(signal.SIGSTOP)
            later(OUTAGE_S, lambda: server.signal(signal.SIGCONT))
        if len(pending) == 1 and len(sweep.trials) > 2 and sweep.trials[2].epochs == 5:
            pending[0].join()
            server.kill()
            later(OUTAGE_S, server.start)

    space = load_space(Path("alpha.py"), load_config("c.yaml"))
    outcome = tune(space, SearchConfig(study="outage-alpha", trials=4, scheduler="none"), break_server)
    assert len(pending) == 2
    assert outcome.undelivered == 0
    assert_whole("outage-alpha", 4, 25)


@pytest.mark.usefixtures("ray_cluster")
def test_a_server_that_dies_while_a_study_starts_or_ends_gives_one_line(server, workplace, monkeypatch):
    write_study(workplace, tiny_config("optim.epochs=1", "scale.cpus_per_worker=1", "run.name=ends"))
    space = load_space(Path("alpha.py"), load_config("c.yaml"))
    search = SearchConfig(study="ends-alpha", trials=1, scheduler="none")

    def then_gone(function):
        def call(*arguments):
            done = function(*arguments)
            server.kill()
            return done

        return call

    with monkeypatch.context() as patched:
        patched.setattr("wml_ray.verbs.tune.check_ratios", then_gone(check_ratios))
        with pytest.raises(UserError, match="the MLflow server does not answer"):
            tune(space, search)
    start_again(server)
    with monkeypatch.context() as patched:
        patched.setattr("wml_ray.verbs.tune.write_study", then_gone(tune_verb.write_study))
        assert tune(space, search).undelivered == 1
    start_again(server)
    assert tune(space, search).undelivered == 0
    assert_whole("ends-alpha", 1, 1)


def start_again(server):
    server.start()
    server.wait()
    MlflowClient(server.uri).search_experiments()  # the first answer of a server is slow


@pytest.mark.nightly
def test_a_soak_of_a_minute_loses_nothing_and_logs_nothing_twice():
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--minutes", "1", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.rpartition(" ")[0].strip(): line.rpartition(" ")[2] for line in done.stdout.splitlines()}
    assert sum(int(rows[f"{target}s killed"]) for target in ("trial", "driver", "server")) > 1, done.stdout
    assert int(rows["epochs logged"]) == int(rows["epochs asked"]) > 0
