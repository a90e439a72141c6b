"""Runs and studies in an S3 server of a process of its own, which stops, refuses and comes back; and who may write."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from family import checkpoint, tiny_config
from ray import tune as ray_tune_api
from runs import assert_bit_equal, client, ignore, only_run, steps, wait_for_epoch
from safetensors.torch import save_file
from servers import ObjectStore
from studies import children, small_space

from wml_ray.checkpoints.remote import open_checkpoints
from wml_ray.errors import UserError
from wml_ray.search.settings import search_config
from wml_ray.search.trials import TrialStore
from wml_ray.storage.files import get_text, put_text
from wml_ray.storage.lease import LEASE_FILE, STALE_S, LeaseLost, exclusive_access
from wml_ray.storage.paths import to_path
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train
from wml_ray.verbs.tune import tune

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"token": "another", "host": "another-host", "pid": 7}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ObjectStore(tmp_path_factory.mktemp("s3"))
    server.start()
    server.wait()
    yield server
    server.kill()


@pytest.fixture
def bucket(server, workplace, monkeypatch):
    """The server's address of an empty folder, in an empty working directory."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own patience is not what is tested
    monkeypatch.setattr("wml_ray.storage.retry.STORAGE_TIMEOUT_S", 30.0)
    monkeypatch.setattr("wml_ray.uploads.ABANDONED_S", 0.0)  # only what a run waits for is uploaded at its end
    yield f"s3://runs/{workplace.name}"
    server.resume()
    server.accept_writes()


def downloaded(folder, target):
    """A local copy of a remote folder."""
    folder.fs.get(folder.path, str(target), recursive=True)
    return target


def accuracies(result):
    names = [name for name in result["history"][0]["metrics"] if "seconds" not in name and "per_second" not in name]
    return [[entry["metrics"][name] for name in names] for entry in result["history"]]


def test_a_run_in_object_storage_is_the_run_of_a_local_folder(bucket, workplace):
    local = train(tiny_config("run.name=local"), ignore)
    remote = train(tiny_config(f"run.storage_path={bucket}"), ignore)
    assert accuracies(remote.result) == accuracies(local.result)
    copy = downloaded(remote.folder, workplace / "copy")
    assert_bit_equal(copy / "checkpoints" / "epoch-0003", local.folder / "checkpoints" / "epoch-0003")
    names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(local.folder)) for path in local.folder.rglob("*") if path.is_file())
    assert {file.path for file in client().list_artifacts(only_run().info.run_id)} == {
        *("config.yaml", "peers.csv", "pictures")
    }
    assert sorted(os.listdir()) == ["copy", "mlflow.db", "mlruns", "results"]
    assert os.listdir("results") == ["local"]
    assert not train(tiny_config(f"run.storage_path={bucket}"), ignore).trained_now


@pytest.mark.parametrize(
    ("stop", "go_on", "away_s"),
    [
        pytest.param("pause", "resume", 0, id="hangs"),
        pytest.param("refuse_writes", "accept_writes", 60, id="refuses for a minute", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the storage", "ignore:the lease on")
def test_training_goes_on_while_the_storage_is_away_and_nothing_is_lost(
    bucket, server, workplace, monkeypatch, stop, go_on, away_s
):
    monkeypatch.setattr("wml_ray.storage.retry.STORAGE_TIMEOUT_S", 180.0)
    epochs = 8
    since_s = []
    whole = train(tiny_config(f"optim.epochs={epochs}", "run.name=whole"), ignore)

    def outage(event):
        if isinstance(event, EpochEnd) and event.epoch == 2:
            getattr(server, stop)()
            since_s.append(time.monotonic())
        if isinstance(event, EpochEnd) and event.epoch == epochs:  # all epochs between were trained without it
            left_s = since_s[0] + away_s - time.monotonic()
            threading.Timer(max(left_s, 0), getattr(server, go_on)).start()

    outcome = train(tiny_config(f"optim.epochs={epochs}", f"run.storage_path={bucket}"), outage)
    assert accuracies(outcome.result) == accuracies(whole.result)
    kept = [path.name for path in sorted((whole.folder / "checkpoints").iterdir())]
    copy = downloaded(outcome.folder / "checkpoints", workplace / "copy")
    assert [path.name for path in sorted(copy.iterdir())] == kept
    for name in kept:
        assert_bit_equal(copy / name, whole.folder / "checkpoints" / name)
    assert steps(only_run(), "train/loss") == list(range(1, epochs + 1))


@pytest.mark.filterwarnings("ignore:.*the storage", "ignore:the lease on")
def test_a_storage_that_stays_away_is_one_sentence_and_the_same_command_continues(bucket, server, monkeypatch):
    monkeypatch.setattr("wml_ray.storage.retry.STORAGE_TIMEOUT_S", 0.5)
    config = tiny_config(f"run.storage_path={bucket}")

    def outage(event):
        if isinstance(event, EpochEnd) and event.epoch == 2:
            server.refuse_writes()

    with pytest.raises(UserError) as error:
        train(config, outage)
    (line,) = str(error.value).splitlines()
    assert "run the same command again when it works" in line
    server.accept_writes()
    monkeypatch.setattr("wml_ray.storage.retry.STORAGE_TIMEOUT_S", 30.0)
    assert train(config, ignore).trained_now
    assert steps(only_run(), "train/loss") == [1, 2, 3]


def test_a_local_disk_that_fails_for_a_while_costs_nothing(workplace, monkeypatch):
    monkeypatch.setattr("wml_ray.storage.files.RETRY_S", 0.01)
    left = [OSError(5, "Input/output error")] * 3

    def failing(tensors, path):
        if path.parent.name.startswith(".epoch-0002") and left:
            raise left.pop()
        save_file(tensors, path)

    monkeypatch.setattr("wml_ray.checkpoint.save_file", failing)
    with pytest.warns(UserWarning, match="the storage fails .Input/output error.; trying again"):
        outcome = train(tiny_config(), ignore)
    assert not left
    assert sorted(path.name for path in (outcome.folder / "checkpoints").iterdir())[-2:] == ["epoch-0002", "epoch-0003"]
    assert steps(only_run(), "train/loss") == [1, 2, 3]


def start(config, **environment):
    """`wml-ray train` in a process of its own."""
    Path("config.yaml").write_text(config.to_yaml())
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-m", "wml_ray", "train", "config.yaml"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.core
def test_a_killed_run_continues_from_what_was_uploaded_with_every_epoch_logged_once(bucket, workplace):
    overrides = ["optim.epochs=12", "data.batch_size=32"]
    whole = train(tiny_config(*overrides, "run.name=whole"), ignore)
    config = tiny_config(*overrides, f"run.storage_path={bucket}")
    uploaded = open_checkpoints(config.run_folder / "checkpoints", 2)
    process = start(config)
    wait_for_epoch(uploaded, 3, process)
    process.kill()
    process.wait()
    assert 3 <= uploaded.epochs()[-1] < 12, "training was too fast to be killed: raise the number of epochs"
    final = start(config)
    assert final.wait(120) == 0, final.stderr.read()
    copy = downloaded(uploaded.path(12), workplace / "copy")
    assert_bit_equal(copy, whole.folder / "checkpoints" / "epoch-0012")
    assert steps(only_run(), "train/loss") == list(range(1, 13))
    assert steps(only_run(), "test/accuracy/peer0") == [12]


def test_a_second_process_in_a_remote_folder_is_refused(bucket, tmp_path):
    """As on another machine: the lock files of this one lie elsewhere for it."""
    config = tiny_config("optim.epochs=1", f"run.storage_path={bucket}")
    errors = []

    def start_another(event):
        if isinstance(event, EpochEnd):
            other = start(config, TMPDIR=str(tmp_path))
            errors.append(other.communicate(timeout=180)[1])
            assert other.returncode == 2

    train(config, start_another)
    (line,) = errors[0].splitlines()
    assert f"in use by process {os.getpid()} on {socket.gethostname()}" in line
    assert not (config.run_folder / LEASE_FILE).exists()


@pytest.fixture
def folder(request, bucket, tmp_path):
    return to_path(bucket) if request.param == "remote" else tmp_path / "shared"


both = pytest.mark.parametrize("folder", ["local", "remote"], indirect=True)


def claim_of(folder, **owner):
    put_text(folder / LEASE_FILE, json.dumps({**ELSEWHERE, "renewed_s": time.time(), **owner}))


@both
def test_a_claim_of_another_host_is_respected_while_it_is_renewed(folder):
    claim_of(folder)
    with pytest.raises(UserError, match="in use by process 7 on another-host"), exclusive_access(folder):
        pass
    assert json.loads((folder / LEASE_FILE).read_text())["token"] == "another"
    claim_of(folder, renewed_s=time.time() - STALE_S)
    with exclusive_access(folder) as lease:
        lease.check()
    assert not (folder / LEASE_FILE).exists()


@both
def test_a_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(folder):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claim_of(folder, host=socket.gethostname(), pid=dead.pid)
    with exclusive_access(folder) as lease:
        lease.check()


def save(checkpoints, epoch):
    checkpoints.save(checkpoint(epoch))
    checkpoints.wait_for_uploads()


@both
def test_who_lost_the_claim_writes_no_more(folder):
    with exclusive_access(folder) as lease:
        checkpoints = open_checkpoints(folder / "checkpoints", 2, lease)
        save(checkpoints, 1)
        claim_of(folder)
        with pytest.raises(LeaseLost, match="taken over by process 7 on another-host"):
            save(checkpoints, 2)
    assert checkpoints.epochs() == [1]
    assert json.loads((folder / LEASE_FILE).read_text())["token"] == "another"


def test_a_run_that_was_taken_over_ends_with_who_did_it(workplace):
    config = tiny_config()

    def take_over(event):
        claim_of(config.run_folder)

    with pytest.raises(LeaseLost, match="another-host"):
        train(config, take_over)
    assert not (config.run_folder / "outcome.json").exists()


@both
def test_a_claim_is_renewed_while_its_process_lives(folder, monkeypatch):
    monkeypatch.setattr("wml_ray.lock.RENEW_S", 0.05)
    with exclusive_access(folder):
        renewals = set()
        deadline_s = time.monotonic() + 10
        while len(renewals) < 10:  # read all the while: a lease is whole at every moment
            renewals.add(json.loads(get_text(folder / LEASE_FILE))["renewed_s"])
            assert time.monotonic() < deadline_s


@pytest.fixture
def uploaded(bucket):
    store = open_checkpoints(to_path(bucket) / "checkpoints", 2)
    for epoch in range(1, 4):
        save(store, epoch)
    return store


def test_a_remote_checkpoint_is_what_was_saved(uploaded):
    saved = checkpoint(4)
    uploaded.save(saved)
    uploaded.wait_for_uploads()
    loaded = uploaded.load(4)
    assert loaded.plan == saved.plan
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in saved.model.items())


def test_a_partial_remote_checkpoint_is_none_and_is_cleaned_up(uploaded):
    (uploaded.path(3) / "SHA256SUMS").unlink()
    assert uploaded.latest().epoch == 2
    save(uploaded, 4)
    assert not uploaded.path(3).exists()
    assert uploaded.latest().epoch == 4


def test_a_damaged_remote_checkpoint_is_passed_over_and_replaced(uploaded):
    (uploaded.path(3) / "plan.json").write_text("{}")
    with pytest.warns(UserWarning, match="epoch-0003 is damaged"):
        assert uploaded.latest().epoch == 2
    save(uploaded, 3)
    assert uploaded.latest().epoch == 3


def test_a_remote_run_that_begins_anew_leaves_no_later_checkpoints(uploaded):
    for epoch in (2, 3):
        (uploaded.path(epoch) / "plan.json").write_text("{}")
    with pytest.warns(UserWarning, match="is damaged"):
        assert uploaded.latest() is None
    save(uploaded, 1)
    assert uploaded.epochs() == [1]


def test_checkpoints_of_a_stopped_trial_leave_the_storage(uploaded):
    ledger = TrialStore(uploaded.folder.parent)
    trial = open_checkpoints(ledger.trial_folder(3) / "a-run" / "checkpoints", 2)
    save(trial, 1)
    ledger.drop_checkpoints(3)
    assert trial.epochs() == []
    assert uploaded.epochs() == [2, 3]


@pytest.mark.filterwarnings("ignore:.*the storage takes no checkpoint")
def test_what_waits_for_the_storage_is_bounded(bucket, server):
    store = open_checkpoints(to_path(bucket) / "checkpoints", 2)
    server.refuse_writes()
    for epoch in range(1, 7):
        store.save(checkpoint(epoch))
    assert store._here.epochs() == [4, 5, 6]  # the best and the newest two
    server.accept_writes()
    store.wait_for_uploads()
    assert store.epochs() == [4, 5, 6]


def test_storage_that_cannot_be_used_is_refused_in_one_line(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"bucket does not exist.*AWS_ENDPOINT_URL"):
        train(tiny_config("run.storage_path=s3://nobucket/runs"), ignore)
    with pytest.raises(UserError, match="no address of a storage"):
        train(tiny_config("run.storage_path=nothing://here"), ignore)
    program = "import sys; sys.modules['s3fs'] = None; from wml_ray.cli import main; sys.exit(main(sys.argv[1:]))"
    Path("config.yaml").write_text(tiny_config(f"run.storage_path={bucket}").to_yaml())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", program, "train", "config.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs the s3fs package: pip install 'wml_ray[s3]'" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_in_object_storage(bucket, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    two = ["scale.workers=2", "scale.cpus_per_worker=1", "run.test_epoch=best"]
    whole = train(tiny_config(*two, "run.name=whole"), ignore)
    outcome = train(tiny_config(*two, f"run.storage_path={bucket}"), ignore)
    assert accuracies(outcome.result) == accuracies(whole.result)
    assert steps(only_run(), "train/loss") == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_study_in_object_storage_is_whole_and_grows(bucket, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    space = small_space(f"run.storage_path={bucket}", domains={"wml.alpha": ray_tune_api.uniform(0.0, 0.9)})
    tune(space, search_config(study="far", trials=2, scheduler="none"))
    before = [trial.point for trial in TrialStore(to_path(bucket) / "far").trials()]
    outcome = tune(space, search_config(study="far", trials=3, scheduler="none"))
    trials = TrialStore(to_path(bucket) / "far").trials()
    assert [trial.state for trial in trials] == ["COMPLETE"] * 3
    assert [trial.point for trial in trials[:2]] == before
    assert all(steps(run, "train/loss") == [1, 2, 3] for run in children("far"))
    assert (outcome.folder / "report" / "report.html").exists()
    assert sorted(os.listdir()) == ["mlflow.db", "mlruns"]
