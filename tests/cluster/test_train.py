"""Through Ray's own workers, on one cluster for all tests."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import ray
from family import tiny_config
from mlflow import MlflowClient
from runs import assert_bit_equal, ignore, only_run, start_training, steps, wait_for_epoch
from servers import Server, guarded

from wml_ray.checkpoints.checkpoint import Checkpoints
from wml_ray.cluster.messages import DriverQueue
from wml_ray.errors import Diverged, UserError
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train

TESTS = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

TWO = ["scale.workers=2", "scale.cpus_per_worker=1", "optim.epochs=6", "data.batch_size=32"]


def training_workers():
    """Process ids of Ray's training workers on this machine."""
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listing.splitlines() if "ray::RayTrainWorker" in line]


@pytest.mark.core
def test_two_workers_one_of_them_killed_end_bit_equal_to_an_undisturbed_run(workplace, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    whole = train(tiny_config(*TWO, "run.storage_path=whole", "run.name=whole"), ignore)
    killed = []

    def kill_one_worker(event):
        if isinstance(event, EpochEnd) and event.epoch == 2 and not killed:
            killed.append(training_workers()[-1])
            os.kill(killed[0], signal.SIGKILL)

    config = tiny_config(*TWO)
    outcome = train(config, kill_one_worker)
    assert killed
    assert outcome.undelivered == 0
    assert_bit_equal(config.run_folder / "checkpoints" / "epoch-0006", whole.folder / "checkpoints" / "epoch-0006")
    assert only_run().info.status == "FINISHED"
    for metric in ("train/loss", "val/accuracy/peer3", "weights/peer0"):
        assert steps(only_run(), metric) == [1, 2, 3, 4, 5, 6]


def test_divergence_on_a_worker_ends_the_run_with_its_message(workplace):
    with pytest.raises(Diverged, match=r"loss of peers? .* learning rate 1e\+30"):
        train(tiny_config("scale.workers=1", "optim.learning_rate=1e30", "optim.schedule=constant"), ignore)
    assert only_run().info.status == "FAILED"


def test_a_password_of_mlflow_reaches_the_workers_of_a_cluster_that_was_there_before(workplace, tmp_path, monkeypatch):
    server = Server(tmp_path)
    server.start()
    try:
        server.wait()
        with guarded(server, "ann", "secret") as address:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
                train(tiny_config("scale.workers=1"), ignore)
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
            assert train(tiny_config("scale.workers=1"), ignore).undelivered == 0
        client = MlflowClient(server.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("wml").experiment_id])
        assert "val/accuracy/peer3" in run.data.metrics
    finally:
        server.kill()


def test_letters_that_nobody_waits_for_arrive_in_order_and_are_not_held_up_by_the_receiver():
    """More than the thousand calls of an actor that Ray runs at a time; none is taken before all are sent."""
    all_sent, received = threading.Event(), []

    def receive(number):
        all_sent.wait(30)
        received.append(number)

    with DriverQueue({"numbers": receive}) as mailbox:
        send = mailbox.sender("numbers", answered=False)
        ray.get([send(number) for number in range(1500)], timeout=30)
        all_sent.set()
    assert received == list(range(1500))


def test_ctrl_c_while_ray_workers_train_says_how_to_continue(workplace):
    config = tiny_config("scale.workers=1", "scale.cpus_per_worker=1", "optim.epochs=400")
    (workplace / "config.yaml").write_text(config.to_yaml())
    process = start_training()
    wait_for_epoch(Checkpoints(config.run_folder / "checkpoints", 2), 1, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert only_run().info.status == "KILLED"


def test_a_run_goes_on_with_another_number_of_workers(workplace):
    class Stop(Exception):
        pass

    def stop_after_two(event):
        if isinstance(event, EpochEnd) and event.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        train(tiny_config("optim.epochs=4"), stop_after_two)
    outcome = train(tiny_config("optim.epochs=4", "scale.workers=2", "scale.cpus_per_worker=1"), ignore)
    assert outcome.trained_now
    assert steps(only_run(), "train/loss") == [1, 2, 3, 4]


def test_an_elastic_range_takes_what_the_cluster_has(workplace):
    outcome = train(tiny_config("scale.workers=[1,2]", "scale.cpus_per_worker=1", "optim.epochs=2"), ignore)
    assert outcome.undelivered == 0
    assert steps(only_run(), "train/loss") == [1, 2]


@pytest.mark.parametrize("ask", ["scale.workers=64", "scale.cpus_per_worker=64"])
def test_more_than_the_cluster_has_is_an_error_before_anything_is_written(workplace, ask):
    with pytest.raises(UserError, match=r"do not fit: this cluster has [02] such places, and no autoscaler"):
        train(tiny_config("scale.workers=2", ask), ignore)
    assert not os.listdir()
