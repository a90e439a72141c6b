"""Against a real MLflow server that is really killed."""

import socket

import pytest
from family import tiny_config
from mlflow import MlflowClient
from servers import Server, free_port

from wml_ray.tracking.client import check_reachable
from wml_ray.tracking.runs import MetricLogger, TrackedRun
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.wait()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


def logged_steps(server, metric):
    client = MlflowClient(server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("wml").experiment_id])
    return run, [entry.step for entry in client.get_metric_history(run.info.run_id, metric)]


def at_epoch(epoch, action):
    def on_event(event):
        if isinstance(event, EpochEnd) and event.epoch == epoch:
            action()

    return on_event


@pytest.mark.core
def test_a_server_killed_in_mid_run_and_back_later_misses_nothing(workplace, server):
    def restart():
        server.kill()
        server.start()

    outcome = train(tiny_config("optim.epochs=6"), at_epoch(2, restart))
    assert outcome.undelivered == 0
    for metric in ("train/loss", "val/accuracy/peer2"):
        run, steps = logged_steps(server, metric)
        assert steps == [1, 2, 3, 4, 5, 6]
    assert logged_steps(server, "test/accuracy/peer0")[1] == [6]
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_what_a_dead_server_missed_is_kept_and_delivered_by_the_same_command(workplace, server, monkeypatch):
    monkeypatch.setattr("wml_ray.cluster.train.DELIVERY_S", 1.0)
    config = tiny_config("optim.epochs=4")
    outcome = train(config, at_epoch(2, server.kill))
    assert outcome.undelivered > 0
    assert (config.run_folder / "result.json").exists()
    server.start()
    server.wait()
    monkeypatch.setattr("wml_ray.cluster.train.DELIVERY_S", 60.0)
    again = train(config, lambda event: None)
    assert (again.undelivered, again.trained_now) == (0, False)
    run, steps = logged_steps(server, "train/loss")
    assert steps == [1, 2, 3, 4]
    assert run.info.status == "FINISHED"
    assert logged_steps(server, "test/accuracy/peer0")[1] == [4]


def test_logging_waits_for_no_answer():
    """A thousand steps are logged while the first request still waits: log() has made none of its own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracker = MetricLogger(TrackedRun(f"http://127.0.0.1:{silent.getsockname()[1]}", "0", "none"))
        tracker.log(0, {"train/loss": 1.0}, 0)
        silent.settimeout(60)
        request, _ = silent.accept()
        for step in range(1, 1000):
            tracker.log(step, {"train/loss": 1.0}, 0)
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()
        assert tracker.close(timeout_s=0) == 1000
        request.close()


def test_a_password_in_the_address_is_never_shown(monkeypatch):
    uri = f"http://someone:secret@127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=r"127\.0\.0\.1") as raised:
        check_reachable(uri)
    assert "secret" not in str(raised.value)
    assert "secret" not in TrackedRun(uri, "1", "2").command
