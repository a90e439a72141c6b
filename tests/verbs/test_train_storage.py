"""Whole runs while their storage hangs, refuses, fails or is full, in an S3 server and in local folders."""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from family import tiny_config
from ray import tune as ray_tune_api
from runs import assert_bit_equal, client, ignore, only_run, steps, wait_for_epoch
from safetensors.torch import save_file
from servers import OUTAGE_S
from studies import children, small_space

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.errors import UserError
from wml_ray.search.settings import SearchConfig
from wml_ray.search.trials import TrialStore
from wml_ray.storage.files import put_text
from wml_ray.storage.lease import LEASE_FILE, LeaseLost
from wml_ray.storage.paths import to_path
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train
from wml_ray.verbs.tune import tune

ROOT = Path(__file__).parents[2]


def downloaded(folder, target):
    """A local copy of a remote folder."""
    folder.fs.get(folder.path, str(target), recursive=True)
    return target


def accuracies(result):
    names = [name for name in result["history"][0]["metrics"] if "seconds" not in name and "per_second" not in name]
    return [[entry["metrics"][name] for name in names] for entry in result["history"]]


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


def at_epoch(epoch, call):
    """An event handler that makes a call at the end of an epoch."""

    def on_event(event):
        if isinstance(event, EpochEnd) and event.epoch == epoch:
            call()

    return on_event


def test_a_run_in_object_storage_equals_the_run_in_a_local_folder(bucket, workplace):
    local = train(tiny_config("run.name=local"), ignore)
    remote = train(tiny_config(f"run.storage_path={bucket}"), ignore)
    assert accuracies(remote.record) == accuracies(local.record)
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
    ("stop", "resume", "away_s"),
    [
        pytest.param("pause", "resume", 0, id="hangs"),
        pytest.param("refuse_writes", "accept_writes", OUTAGE_S, id="refuses", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the storage", "ignore:the lease on", "ignore:no checkpoint can be uploaded")
def test_training_continues_during_an_outage_of_the_storage_and_loses_nothing(
    bucket, object_store, workplace, monkeypatch, stop, resume, away_s
):
    for module in ("storage.retry", "checkpoints.store"):
        monkeypatch.setattr(f"wml_ray.{module}.STORAGE_TIMEOUT_S", 120.0 + away_s)
    epochs = 8
    since_s = []
    whole = train(tiny_config(f"optim.epochs={epochs}", "run.name=whole"), ignore)

    def outage(event):
        if isinstance(event, EpochEnd) and event.epoch == 2:
            getattr(object_store, stop)()
            since_s.append(time.monotonic())
        if isinstance(event, EpochEnd) and event.epoch == epochs:  # all epochs between were trained without it
            left_s = since_s[0] + away_s - time.monotonic()
            threading.Timer(max(left_s, 0), getattr(object_store, resume)).start()

    outcome = train(tiny_config(f"optim.epochs={epochs}", f"run.storage_path={bucket}"), outage)
    assert accuracies(outcome.record) == accuracies(whole.record)
    kept = [path.name for path in sorted((whole.folder / "checkpoints").iterdir())]
    copy = downloaded(outcome.folder / "checkpoints", workplace / "copy")
    assert [path.name for path in sorted(copy.iterdir())] == kept
    for name in kept:
        assert_bit_equal(copy / name, whole.folder / "checkpoints" / name)
    assert steps(only_run(), "train/loss") == list(range(1, epochs + 1))


@pytest.mark.filterwarnings("ignore:.*the storage", "ignore:the lease on", "ignore:no checkpoint can be uploaded")
def test_a_storage_that_stays_away_ends_the_run_with_one_line_and_the_same_command_resumes(
    bucket, object_store, monkeypatch
):
    for module in ("storage.retry", "checkpoints.store"):
        monkeypatch.setattr(f"wml_ray.{module}.STORAGE_TIMEOUT_S", 0.5)
    config = tiny_config(f"run.storage_path={bucket}")
    with pytest.raises(UserError) as error:
        train(config, at_epoch(2, object_store.refuse_writes))
    (line,) = str(error.value).splitlines()
    assert "run the same command again when it works" in line
    object_store.accept_writes()
    for module in ("storage.retry", "checkpoints.store"):
        monkeypatch.setattr(f"wml_ray.{module}.STORAGE_TIMEOUT_S", 30.0)
    assert train(config, ignore).trained_now
    assert steps(only_run(), "train/loss") == [1, 2, 3]


def test_a_local_disk_that_fails_for_a_while_costs_nothing(workplace, monkeypatch):
    monkeypatch.setattr("wml_ray.storage.retry.RETRY_S", 0.01)
    left = [OSError(5, "Input/output error")] * 3

    def failing(tensors, path):
        if path.parent.name.startswith(".epoch-0002") and left:
            raise left.pop()
        save_file(tensors, path)

    monkeypatch.setattr("wml_ray.checkpoints.checkpoint.save_file", failing)
    with pytest.warns(UserWarning, match="the storage fails .Input/output error.; retrying"):
        outcome = train(tiny_config(), ignore)
    assert not left
    assert Checkpoints(outcome.folder / "checkpoints", 2).epochs()[-2:] == [2, 3]
    assert steps(only_run(), "train/loss") == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["enlarge", "stay"])
def test_a_run_waits_for_room_on_a_full_disk_and_ends_with_one_line_if_there_is_none(workplace, mode):
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces")
    done = subprocess.run(
        [*unshare, sys.executable, str(ROOT / "tests" / "full_disk.py"), mode],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if mode == "enlarge":
        waited = re.findall(r"no space left on .*/(.*); retrying", done.stdout)
        run_id = tiny_config("optim.epochs=2").run_id  # the name of the folder with the report
        assert waited == ["checkpoints", "checkpoints", "result.json", run_id]  # of epochs 0 and 2, and at the end
        assert steps(only_run(), "train/loss") == [1, 2]
    else:
        assert re.search("^wml-ray: no space left on .*/checkpoints; run the same command again", done.stderr, re.M)
        assert "run the same command again when it works: it resumes from the newest checkpoint" in done.stdout


def test_a_run_without_a_usable_checkpoint_is_not_begun_anew(workplace):
    config = tiny_config()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, at_epoch(2, interrupt))
    checkpoints = Checkpoints(config.run_folder / "checkpoints", 2)
    *epochs, last = checkpoints.epochs()
    for epoch in epochs:
        (checkpoints.path(epoch) / "plan.json").write_text("{}")
    foreign = checkpoints.load(last)
    checkpoints.save(replace(foreign, metadata={**foreign.metadata, "run_id": "another"}))
    with (
        pytest.warns(UserWarning, match="is of another run"),
        pytest.raises(UserError, match=r"no checkpoint in .* can be used; restore one, or remove it to start over"),
    ):
        train(config, ignore)
    assert checkpoints.epochs() == [*epochs, last]


@pytest.mark.core
def test_a_killed_run_resumes_from_its_uploads_with_every_epoch_logged_once(bucket, workplace):
    overrides = ["optim.epochs=12", "data.batch_size=32"]
    whole = train(tiny_config(*overrides, "run.name=whole"), ignore)
    config = tiny_config(*overrides, f"run.storage_path={bucket}")
    uploaded = Checkpoints(config.run_folder / "checkpoints", 2)
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


def test_a_run_that_was_taken_over_ends_and_names_the_other_process(workplace):
    config = tiny_config()

    def take_over(event):
        put_text(config.run_folder / LEASE_FILE, '{"token": "another", "host": "another-host", "pid": 7}')

    with pytest.raises(LeaseLost, match="process 7 on another-host"):
        train(config, take_over)
    assert not (config.run_folder / "status.json").exists()


def test_a_storage_that_cannot_be_used_is_refused_in_one_line(bucket):
    with pytest.raises(UserError, match=r"bucket does not exist.*AWS_ENDPOINT_URL"):
        train(tiny_config("run.storage_path=s3://nobucket/runs"), ignore)
    with pytest.raises(UserError, match="no address of a storage"):
        train(tiny_config("run.storage_path=nothing://here"), ignore)
    program = "import sys; sys.modules['s3fs'] = None; from wml_ray.cli.main import main; sys.exit(main(sys.argv[1:]))"
    Path("config.yaml").write_text(tiny_config(f"run.storage_path={bucket}").to_yaml())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", program, "train", "config.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs the s3fs package: pip install 'wml_ray[s3]'" in done.stderr.splitlines()[-1]


def test_the_checkpoints_of_a_stopped_trial_are_removed_from_the_storage(bucket):
    store = TrialStore(to_path(bucket))
    checkpoints = Checkpoints(store.trial_folder(3) / "a-run" / "checkpoints", 2)
    put_text(checkpoints.path(1) / "SHA256SUMS", "")
    assert checkpoints.epochs() == [1]
    store.delete_checkpoints(3)
    assert checkpoints.epochs() == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_in_object_storage(bucket, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    two = ["scale.workers=2", "scale.cpus_per_worker=1", "run.test_epoch=best"]
    whole = train(tiny_config(*two, "run.name=whole"), ignore)
    outcome = train(tiny_config(*two, f"run.storage_path={bucket}"), ignore)
    assert accuracies(outcome.record) == accuracies(whole.record)
    assert steps(only_run(), "train/loss") == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_study_in_object_storage_is_complete_and_can_be_enlarged(bucket, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    space = small_space(f"run.storage_path={bucket}", domains={"wml.alpha": ray_tune_api.uniform(0.0, 0.9)})
    tune(space, SearchConfig(study="far", trials=2, scheduler="none"))
    before = [trial.point for trial in TrialStore(to_path(bucket) / "far").trials()]
    outcome = tune(space, SearchConfig(study="far", trials=3, scheduler="none"))
    trials = TrialStore(to_path(bucket) / "far").trials()
    assert [trial.state for trial in trials] == ["COMPLETE"] * 3
    assert [trial.point for trial in trials[:2]] == before
    assert all(steps(run, "train/loss") == [1, 2, 3] for run in children("far"))
    assert (outcome.folder / "report" / "report.html").exists()
    assert sorted(os.listdir()) == ["mlflow.db", "mlruns"]
