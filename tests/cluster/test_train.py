"""Training on Ray's workers, on one cluster for all tests."""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import ray
from family import DIVERGES, tiny_config
from mlflow import MlflowClient
from nodes import named
from runs import assert_bit_equal, ignore, interrupt_training, only_run, steps
from servers import Server, guarded

from wml_ray.cluster.messages import DriverQueue
from wml_ray.errors import Diverged, UserError
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train

TESTS = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

TWO = ["scale.workers=2", "scale.cpus_per_worker=1", "optim.epochs=6", "data.batch_size=32"]


def training_workers():
    """Process ids of the training workers of this process's own cluster."""
    return [process.pid for process in named(psutil.Process(), "ray::RayTrainWorker")]


@pytest.mark.core
def test_a_run_whose_worker_was_killed_ends_bit_equal_to_an_undisturbed_run(workplace, monkeypatch):
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


def test_divergence_on_a_worker_ends_the_run_with_the_message_of_that_worker(workplace):
    with pytest.raises(Diverged, match=r"loss of peers? .* learning rate 100"):
        train(tiny_config("scale.workers=1", *DIVERGES), ignore)
    assert only_run().info.status == "FAILED"


def test_mlflow_credentials_reach_the_workers_of_a_cluster_that_was_started_without_them(
    workplace, tmp_path, monkeypatch
):
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


def test_messages_that_are_not_acknowledged_keep_their_order_and_do_not_wait_for_the_receiver():
    all_sent, received = threading.Event(), []

    def receive(number):
        assert all_sent.wait(30)
        received.append(number)

    with DriverQueue({"numbers": receive}) as queue:
        send = queue.sender("numbers", acknowledge=False)
        assert all(send(number) for number in range(200))
        all_sent.set()
    assert received == list(range(200))


def test_a_sender_waits_until_its_own_message_is_processed_or_refused():
    """Also after a worker that died while it waited: its reply is not taken for the reply to the next one."""
    receiving, continues, received = threading.Event(), threading.Event(), []

    def receive(number):
        receiving.set()
        assert continues.wait(60)
        if number == 3:
            raise SystemExit
        received.append(number)

    @ray.remote(max_retries=0)
    def call(send, number):
        return send(number)

    queue = DriverQueue({"numbers": receive})
    send = queue.sender("numbers")
    lost = call.remote(send, 1)
    assert receiving.wait(60)
    ray.cancel(lost, force=True)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(lost)
    continues.set()
    assert send(2)
    assert received == [1, 2]
    assert not send(3)
    assert not send(4)
    with pytest.raises(SystemExit), queue:
        pass
    assert received == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_sigterm_during_training_on_workers_prints_how_to_continue(workplace, number):
    config = tiny_config("scale.workers=1", "scale.cpus_per_worker=1", "optim.epochs=400")
    interrupt_training(config, number)


def test_a_run_continues_with_another_number_of_workers(workplace):
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


def test_an_elastic_run_uses_the_workers_that_fit_the_cluster(workplace):
    outcome = train(tiny_config("scale.workers=[1,2]", "scale.cpus_per_worker=1", "optim.epochs=2"), ignore)
    assert outcome.undelivered == 0
    assert steps(only_run(), "train/loss") == [1, 2]


@pytest.mark.parametrize("override", ["scale.workers=64", "scale.cpus_per_worker=64"])
def test_more_than_the_cluster_has_is_an_error_before_anything_is_written(empty_workplace, override):
    with pytest.raises(UserError, match=r"do not fit: this cluster has [02] such slots, and no autoscaler"):
        train(tiny_config("scale.workers=2", override), ignore)
    assert not os.listdir()
