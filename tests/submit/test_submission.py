"""Runs and studies as jobs of a real Ray head with token authentication."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from deadline import DEADLINE_S
from head import Head
from mlflow import MlflowClient
from servers import Server, guarded

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.config.load import load_config
from wml_ray.submit.client import connect
from wml_ray.submit.entry import ENVIRONMENT_FILE
from wml_ray.submit.job import Job
from wml_ray.submit.jobs import follow_job, runtime_env
from wml_ray.submit.package import write_package

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "jobs" / "quickstart.yaml")
SMALL = [QUICKSTART, "pruning.saliency_images=32", "data.batch_size=256"]
SECRET = "unlikely-word-4711"


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    head = Head(tmp_path_factory.mktemp("head"))
    try:
        head.wait()
        yield head
    finally:
        head.stop()


@pytest.fixture
def client(head, monkeypatch):
    monkeypatch.setenv("HOME", str(head.home))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # `connect` sets it
    return connect(head.url)


def runs(uri, experiment):
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def wait_until(true, timeout_s=DEADLINE_S):
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def run_id(*words):
    return load_config(words[0], words[1:]).run_id


@pytest.mark.core
def test_the_same_run_submitted_twice_at_once_is_one_job_that_both_follow_to_its_end(head, client, tmp_path):
    words = [*SMALL, "optim.epochs=1"]
    both = [head.start("submit", "train", *words, folder=tmp_path) for _ in range(2)]
    ended = [process.communicate(timeout=DEADLINE_S) for process in both]
    name = run_id(*words)
    for process, (out, errors) in zip(both, ended, strict=True):
        assert process.returncode == 0, out + errors
        assert f"run {name}: 4 peers of resnet20 on digits" in out
        assert f"job         {name} SUCCEEDED" in out
    assert sum("nothing was submitted" in out for out, _ in ended) == 1
    assert f"newest jobs there: {name}\n" in head.run("jobs", "status", "nobody").stderr
    assert head.run("jobs", "status").stdout.split()[:2] == [name, "SUCCEEDED"]
    assert head.run("jobs", "stop", name).stdout == f"job         {name} has ended before: SUCCEEDED\n"
    assert (tmp_path / "results" / "wml" / name / "result.json").exists()
    assert [run.info.status for run in runs(f"sqlite:///{tmp_path}/mlflow.db", "wml")] == ["FINISHED"]

    again = head.run("submit", "train", *words, folder=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"job         {name}-2 SUCCEEDED" in again.stdout
    assert "finished before" in again.stdout
    for follow in ([], ["--follow"]):
        log = head.run("jobs", "logs", f"{name}-2", *follow)
        assert log.returncode == 0, log.stderr
        assert "finished before" in log.stdout
    assert len({client.get_job_info(job).runtime_env["working_dir"] for job in (name, f"{name}-2")}) == 1


def test_a_stopped_run_is_killed_in_mlflow_keeps_its_checkpoint_and_gives_its_cores_back(head, tmp_path):
    words = [*SMALL, "optim.epochs=900", "scale.workers=1"]
    name = run_id(*words)
    tracked = f"sqlite:///{tmp_path}/elsewhere.db"
    detached = head.run("submit", "train", *words, "--detach", folder=tmp_path, MLFLOW_TRACKING_URI=tracked)
    assert detached.returncode == 0, detached.stderr
    assert f"stop        wml-ray jobs stop {name} --address {head.url}" in detached.stdout
    checkpoints = Checkpoints(tmp_path / "results" / "wml" / name / "checkpoints", 2)
    wait_until(lambda: checkpoints.epochs() and checkpoints.epochs()[-1] > 0)

    read_no_more = head.start("submit", "train", *words, folder=tmp_path)
    assert "nothing was submitted" in read_no_more.stdout.readline()
    read_no_more.stdout.close()
    follower = head.start("submit", "train", *words, folder=tmp_path)
    while not follower.stdout.readline().startswith(f"{name} epoch "):
        assert follower.poll() is None, follower.stderr.read()
    labels = re.compile(rf'ray_wml_val_accuracy{{.*model="peer3".*run="{name}".*}} [01]\.?\d*')
    wait_until(lambda: labels.search(head.metrics()))
    follower.send_signal(signal.SIGINT)
    out, errors = follower.communicate(timeout=DEADLINE_S)
    assert follower.returncode == 1
    assert f"job {name} continues" in errors
    assert f"wml-ray jobs stop {name}" in out
    assert "Traceback" not in errors
    assert read_no_more.wait(DEADLINE_S) == 1
    with read_no_more.stderr as errors:
        assert errors.read() == ""

    status = head.run("jobs", "status", name).stdout
    assert f"job         {name} RUNNING" in status
    assert f"command     wml-ray submit train {' '.join(words)} --detach" in status
    with head.watched_cores() as wait_for_cores:
        stopped = head.run("jobs", "stop", name)
        wait_for_cores(2)
    assert (stopped.returncode, stopped.stdout) == (0, f"job         {name} STOPPED\n"), stopped.stderr
    (run,) = runs(tracked, "wml")
    assert run.info.status == "KILLED"
    assert checkpoints.latest().epoch > 0


def test_a_stopped_study_is_killed_in_mlflow_and_submitted_again_goes_on(head, tmp_path):
    words = [str(ROOT / "jobs" / "search.yaml"), "--space", str(ROOT / "tune_spaces" / "smoke.py"), "--trials", "2"]
    words += [
        "--scheduler",
        "none",
        "optim.epochs=6",
        "data.batch_size=256",
        "pruning.saliency_images=32",
        "run.name=short",
    ]
    tracked = f"sqlite:///{tmp_path}/mlflow.db"

    def trials(*statuses):
        return [
            run for run in runs(tracked, "short-smoke") if "mlflow.parentRunId" in run.data.tags and run.data.metrics
        ]

    detached = head.run("submit", "tune", *words, "--detach", folder=tmp_path)
    assert detached.returncode == 0, detached.stderr
    wait_until(lambda: list(tmp_path.glob("results/short-smoke/trials/**/epoch-0001")))
    assert head.run("jobs", "stop", "short-smoke").returncode == 0
    assert {run.info.status for run in runs(tracked, "short-smoke")} == {"KILLED"}
    again = head.run("submit", "tune", *words, folder=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "job         short-smoke-2 SUCCEEDED" in again.stdout
    assert sorted(run.info.status for run in runs(tracked, "short-smoke")) == ["FINISHED"] * 3


def test_passed_variables_reach_drivers_and_workers_but_no_log(head, client, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    package = write_package(Job("train", load_config(QUICKSTART)), tmp_path / "package")
    (package.folder / "probe.py").write_text(
        "import os, ray\n"
        "from wml_ray.submit.entry import apply_environment\n"
        "apply_environment()\n"
        "length = lambda: len(os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        "ray.init()\nprint('driver', length(), 'worker', ray.get(ray.remote(length).remote()))\n"
    )
    job_id = client.submit_job(entrypoint="python probe.py", runtime_env=runtime_env(package, None, False))
    log = []
    assert follow_job(client, job_id, log.append).status == "SUCCEEDED"
    assert f"driver {len(SECRET)} worker {len(SECRET)}" in "".join(log)
    logs = [path for path in (head.temp / "session_latest" / "logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path.name for path in logs if SECRET.encode() in path.read_bytes()]
    assert SECRET not in str(client.get_job_info(job_id))
    passed = list(head.temp.rglob(ENVIRONMENT_FILE))
    assert passed
    assert not any(path.stat().st_mode & 0o077 for path in passed)


def test_no_password_of_a_run_a_study_or_a_job_is_shown_written_or_kept(head, client, tmp_path):
    """It is looked for in output, command lines, logs and state of Ray, and all files, with databases of MLflow and
    Optuna.
    """
    server, small = Server(tmp_path / "server"), [*SMALL, "optim.epochs=2", "scale.cpus_per_worker=1"]
    server.folder.mkdir()
    server.start()
    here = {"RAY_ADDRESS": f"127.0.0.1:{head.port}", "RAY_AUTH_MODE": "token", "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    space = ["--space", str(ROOT / "tune_spaces" / "smoke.py"), "--trials", "1"]
    commands = {
        "a-run": (["train", *small, "scale.workers=1", "run.name=a-run"], here),
        "a-study": (["tune", *small, "run.name=a-study", *space], here),
        "a-job": (["submit", "train", *small, "scale.workers=1", "run.name=a-job"], {}),
    }
    seen = set()
    try:
        server.wait()
        with guarded(server, "ann", SECRET) as address:
            passwords = {
                "MLFLOW_TRACKING_URI": address.replace("//", f"//ann:{SECRET}@"),
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "OPTUNA_STORAGE": f"sqlite:///file:{tmp_path}/optuna.db?uri=true&password={SECRET}",
            }
            for words, cluster in commands.values():
                process = head.start(*words, folder=tmp_path, **passwords, **cluster)
                while process.poll() is None:
                    seen.add(subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout)
                    time.sleep(0.2)
                out, errors = process.communicate()
                assert process.returncode == 0, out + errors
                seen |= {out, errors}
    finally:
        server.kill()
    state = head.state()
    for name in commands:
        assert f"run.name={name}" in state["api/v0/jobs"], "Ray's state has no such driver"
    assert all(name in state["api/train/v2/runs/v1"] for name in ("a-run", "a-job")), "Ray's state has no such run"
    shown = [*seen, *state.values(), str(client.list_jobs())]
    assert [text[max(0, text.index(SECRET) - 500) :][:600] for text in shown if SECRET in text] == []
    files = [path for folder in (head.temp, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert {"server.db", "optuna.db", "result.json", "trial.json", "raylet.out"} <= {path.name for path in files}
    holding = {path.name for path in files if SECRET.encode() in path.read_bytes()}
    assert holding <= {ENVIRONMENT_FILE}  # of a working directory; only its owner can read it


def test_the_dashboard_of_the_cluster_at_ray_address_is_used_where_a_host_has_two(head, tmp_path_factory):
    other = Head(tmp_path_factory.mktemp("other"))
    try:
        other.wait()
        for one in (head, other):
            address = {"RAY_ADDRESS": f"127.0.0.1:{one.port}"}
            unknown = one.run("jobs", "status", "nobody", **address)
            assert f"no job 'nobody' on {one.url};" in unknown.stderr
            refused = one.run("jobs", "status", RAY_AUTH_TOKEN="wrong", **address)
            assert refused.returncode == 2
            (line,) = refused.stderr.splitlines()
            assert f"at RAY_ADDRESS = 127.0.0.1:{one.port} does not accept the token of RAY_AUTH_TOKEN" in line
    finally:
        other.stop()
