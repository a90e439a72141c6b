"""Runs and studies as jobs of a real Ray head with token authentication."""

import json
import os
import re
import signal
import time
import zipfile
from pathlib import Path

import pytest
from head import Head
from mlflow import MlflowClient

from wml_ray.checkpoints.checkpoint import Checkpoints
from wml_ray.config.load import load_config
from wml_ray.errors import UserError
from wml_ray.submit.client import connect
from wml_ray.submit.entry import ENVIRONMENT, SUBMITTED_FROM, cli, on_cluster, socket
from wml_ray.submit.jobs import follow, runtime_env
from wml_ray.submit.package import pack, work_of

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


def runs(uri, experiment):
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


def wait_until(true, timeout_s=90):
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def run_id(*words):
    return load_config(words[0], words[1:]).run_id


@pytest.mark.core
def test_the_same_run_submitted_twice_at_once_is_one_job_that_both_follow_to_its_end(head, tmp_path):
    words = [*SMALL, "optim.epochs=1"]
    both = [head.start("train", *words, folder=tmp_path) for _ in range(2)]
    ended = [process.communicate(timeout=150) for process in both]
    name = run_id(*words)
    for process, (out, errors) in zip(both, ended, strict=True):
        assert process.returncode == 0, out + errors
        assert f"run {name}: 4 peers of resnet20 on digits" in out
        assert f"job         {name} SUCCEEDED" in out
    assert sum("nothing was submitted" in out for out, _ in ended) == 1
    assert f"newest jobs there: {name}\n" in head.run("status", "nobody").stderr
    assert head.run("status").stdout.split()[:2] == [name, "SUCCEEDED"]
    assert head.run("stop", name).stdout == f"job         {name} had ended before: SUCCEEDED\n"
    assert (tmp_path / "results" / "wml" / name / "result.json").exists()
    assert [run.info.status for run in runs(f"sqlite:///{tmp_path}/mlflow.db", "wml")] == ["FINISHED"]

    again = head.run("train", *words, folder=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"job         {name}-2 SUCCEEDED" in again.stdout
    assert "finished before" in again.stdout


@pytest.mark.slow
def test_a_stopped_run_is_killed_in_mlflow_keeps_its_checkpoint_and_gives_its_cores_back(head, tmp_path):
    words = [*SMALL, "optim.epochs=900", "scale.workers=1"]
    name = run_id(*words)
    tracked = f"sqlite:///{tmp_path}/elsewhere.db"
    detached = head.run("train", *words, "--detach", folder=tmp_path, MLFLOW_TRACKING_URI=tracked)
    assert detached.returncode == 0, detached.stderr
    assert f"stop        python jobs/submit.py stop {name} --address {head.url}" in detached.stdout
    checkpoints = Checkpoints(tmp_path / "results" / "wml" / name / "checkpoints", 2)
    wait_until(lambda: checkpoints.epochs() and checkpoints.epochs()[-1] > 0)

    read_no_more = head.start("train", *words, folder=tmp_path)
    assert "nothing was submitted" in read_no_more.stdout.readline()
    read_no_more.stdout.close()
    follower = head.start("train", *words, folder=tmp_path)
    while not follower.stdout.readline().startswith(f"{name} epoch "):
        assert follower.poll() is None, follower.stderr.read()
    labels = re.compile(rf'ray_wml_val_accuracy{{.*model="peer3".*run="{name}".*}} [01]\.?\d*')
    wait_until(lambda: labels.search(head.metrics()))
    follower.send_signal(signal.SIGINT)
    out, errors = follower.communicate(timeout=20)
    assert follower.returncode == 1
    assert f"{name} goes on" in errors
    assert f"jobs/submit.py stop {name}" in out
    assert "Traceback" not in errors
    assert read_no_more.wait(60) == 1
    with read_no_more.stderr as errors:
        assert errors.read() == ""

    assert f"job         {name} RUNNING" in head.run("status", name).stdout
    with head.watched_cores() as wait_for_cores:
        asked_s = time.monotonic()
        stopped = head.run("stop", name)
        wait_for_cores(2)
        took_s = time.monotonic() - asked_s
    assert (stopped.returncode, stopped.stdout) == (0, f"job         {name} STOPPED\n"), stopped.stderr
    print("stopped, and all cores free, after", took_s)
    assert took_s < 15
    (run,) = runs(tracked, "wml")
    assert run.info.status == "KILLED"
    assert checkpoints.latest().epoch > 0


@pytest.mark.slow
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

    detached = head.run("tune", *words, "--detach", folder=tmp_path)
    assert detached.returncode == 0, detached.stderr
    wait_until(lambda: list(tmp_path.glob("results/short-smoke/trials/**/epoch-0001")))
    assert head.run("stop", "short-smoke").returncode == 0
    assert {run.info.status for run in runs(tracked, "short-smoke")} == {"KILLED"}
    again = head.run("tune", *words, folder=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "job         short-smoke-2 SUCCEEDED" in again.stdout
    assert sorted(run.info.status for run in runs(tracked, "short-smoke")) == ["FINISHED"] * 3


@pytest.mark.slow
def test_what_is_passed_on_reaches_drivers_and_workers_but_no_log(head, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HOME", str(head.home))
    monkeypatch.chdir(tmp_path)
    work = work_of("train", SMALL)
    package = pack(work, tmp_path / "package.zip")
    (tmp_path / "look.py").write_text(
        "import os, ray\n"
        "from wml_ray.job_entry import take_environment\n"
        "take_environment()\n"
        "look = lambda: len(os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        "ray.init()\nprint('driver', look(), 'worker', ray.get(ray.remote(look).remote()))\n"
    )
    with zipfile.ZipFile(package.path, "a") as archive:
        archive.write(tmp_path / "look.py", "look.py")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # `connect` sets it
    client = connect(head.url)
    job_id = client.submit_job(entrypoint="python look.py", runtime_env=runtime_env(work, package, None, False))
    assert follow(client, job_id) == 0
    assert f"driver {len(SECRET)} worker {len(SECRET)}" in client.get_job_logs(job_id)
    logs = [path for path in (head.temp / "session_latest" / "logs").rglob("*") if path.is_file()]
    assert logs
    assert not [path.name for path in logs if SECRET.encode() in path.read_bytes()]
    assert SECRET not in str(client.get_job_info(job_id))
    passed = list(head.temp.rglob(ENVIRONMENT))
    assert passed
    assert not any(path.stat().st_mode & 0o077 for path in passed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "does not accept the token of RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "wrong", "RAY_AUTH_MODE": "token"}, "does not accept the token of RAY_AUTH_TOKEN"),
        ({"HOME": "/nonexistent"}, "asks for a token, and there is none here"),
        ({"HOME": "/nonexistent", "RAY_AUTH_MODE": "token"}, "asks for a token, and there is none here"),
    ],
)
def test_a_wrong_token_or_none_is_one_sentence(head, variables, said):
    refused = head.run("train", *SMALL, **variables)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert said in line
    assert "ray get-auth-token" in line
    assert refused.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", QUICKSTART, "wml.alph=1"], "did you mean 'wml.alpha'"),
        (["train", "nowhere.yaml"], "config file nowhere.yaml"),
        (["tune", QUICKSTART, "--space", "nowhere.py", "--trials", "2"], "space file nowhere.py"),
        (["train", *SMALL, "--image", "busybox"], "would vanish with the container"),
        (["status", "nobody"], "no job 'nobody'"),
        (["stop"], "required: job"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_submitted(head, words, said):
    refused = head.run(*words)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert said in line
    assert refused.stdout == ""


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:8265", "http://127.0.0.1:none"])
def test_an_address_without_a_cluster_is_one_sentence(address, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")  # what is given on the command line wins
    with pytest.raises(UserError, match=r"--address http://HOST:8265") as raised:
        connect(address)
    assert address in str(raised.value)


def test_a_config_at_an_address_is_read_there_and_not_sent(tmp_path):
    (tmp_path / "best.yaml").write_text(Path(QUICKSTART).read_text())
    work = work_of("train", [f"local://{tmp_path}/best.yaml", "optim.epochs=1"])
    assert work.words == [f"local://{tmp_path}/best.yaml", "optim.epochs=1"]
    assert work.files == {}
    assert work.config.optim.epochs == 1


def test_jobs_go_to_the_host_whose_cluster_would_be_joined(monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # `connect` sets it
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.2:6379")
    with pytest.raises(UserError, match=r"no Ray cluster answers at http://127\.0\.0\.2:8265"):
        connect(None)


@pytest.fixture
def repository(workplace):
    """A small one, with all that must not be sent."""
    for name in (
        *(".git/config", ".venv/bin/python", "environment/pyvenv.cfg", "environment/lib/big.py", "data/digits.bin"),
        *("results/wml/model.bin", "mlruns/1/metric", "mlflow.db", "mlflow.db-wal", "wml_ray/__pycache__/run.pyc"),
        *("mine/weights.bin", "pool/image.png", "tests/test_run.py"),
        *("wml_ray/run.py", "wml_ray/data/sets.py", "jobs/train.py"),
    ):
        (workplace / name).parent.mkdir(parents=True, exist_ok=True)
        (workplace / name).write_text(name)
    (workplace / "jobs" / "run.yaml").write_text("run: {storage_path: mine}\ndata: {root: pool}\n")
    return workplace


def test_the_package_has_code_and_configs_and_neither_data_nor_results(repository):
    work = work_of("train", ["jobs/run.yaml"], repository)
    package = pack(work, repository / "package.zip", ["package.zip"], repository)
    names = zipfile.ZipFile(package.path).namelist()
    assert names == ["jobs/run.yaml", "jobs/train.py", "wml_ray/data/sets.py", "wml_ray/run.py"]
    again = pack(work, repository / "again.zip", ["*.zip"], repository)
    assert again.path.read_bytes() == package.path.read_bytes()


def test_this_repository_is_small_to_send(tmp_path):
    package = pack(work_of("train", SMALL), tmp_path / "package.zip")
    names = zipfile.ZipFile(package.path).namelist()
    assert {"wml_ray/run.py", "jobs/train.py", "jobs/quickstart.yaml", "requirements.lock"} <= set(names)
    assert not [name for name in names if name.startswith((".", "data/", "results/", "mlruns/", "mlflow.db"))]
    assert package.size_bytes < 2e6


def test_a_package_too_large_names_the_folder_to_blame(repository):
    (repository / "videos").mkdir()
    with (repository / "videos" / "cat.mp4").open("wb") as file:
        file.truncate(60 * 10**6)
    work = work_of("train", ["jobs/run.yaml"], repository)
    with pytest.raises(UserError, match=r"60 MB to send .* in videos \(60 MB\); at most 50 MB .* --exclude videos"):
        pack(work, repository / "package.zip", (), repository)
    assert pack(work, repository / "package.zip", ["videos"], repository).files == 4


def test_files_from_elsewhere_travel_with_the_package(repository, tmp_path_factory):
    config = tmp_path_factory.mktemp("elsewhere") / "mine.yaml"
    config.write_text("seed: 3\n")
    work = work_of("train", [str(config), "wml.alpha=0.3"], repository)
    assert work.words == ["submitted/config/mine.yaml", "wml.alpha=0.3"]
    package = pack(work, repository / "package.zip", (), repository)
    assert zipfile.ZipFile(package.path).read("submitted/config/mine.yaml") == b"seed: 3\n"


@pytest.mark.parametrize("storage", [["--storage", "{}"], ["--storage={}"]])
def test_a_password_in_the_storage_address_is_not_on_the_command_line(storage, monkeypatch):
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    url = f"postgresql+psycopg://user:{SECRET}@host/database"
    words = [str(ROOT / "jobs" / "search.yaml"), "--space", str(ROOT / "tune_spaces" / "smoke.py"), "--trials", "2"]
    work = work_of("tune", [*words, *(word.format(url) for word in storage), "seed=1"])
    expected = [
        "jobs/search.yaml",
        "--space",
        "tune_spaces/smoke.py",
        "--trials",
        "2",
        "seed=1",
        "--study",
        "wml-smoke",
    ]
    assert work.words == expected
    assert work.environment["OPTUNA_STORAGE"] == url
    assert SECRET not in json.dumps(runtime_env(work, None, None, False))
    assert SECRET not in json.dumps(runtime_env(work, None, "image", False))


def test_relative_folders_of_a_job_outlive_the_working_directory_that_ray_made(workplace, monkeypatch, capsys):
    made = workplace / "working_dir_files" / "_ray_pkg_0"
    made.mkdir(parents=True)
    (made / "config.yaml").write_text("optim: {epochs: 1}\n")
    place = workplace / "place"
    place.mkdir()
    monkeypatch.setattr(cli, "main", lambda words: print(words, os.getcwd()) or 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("HOME", str(workplace / "home"))
    for host, expected in ((socket.gethostname(), place), ("another", workplace / "home" / "wml_ray_jobs")):
        monkeypatch.chdir(made)
        monkeypatch.setenv(SUBMITTED_FROM, f"{host}:{place}")
        assert on_cluster("train", ["config.yaml", "seed=1"]) == 0
        assert f"['train', '{made}/config.yaml', 'seed=1'] {expected}" in capsys.readouterr().out
