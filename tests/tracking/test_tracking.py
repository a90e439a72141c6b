"""Logging to a real MLflow server that is killed, and what is printed of its address."""

import socket

import pytest
from family import tiny_config
from mlflow import MlflowClient
from servers import Server, free_port

from wml_ray.errors import UserError
from wml_ray.tracking.client import check_reachable, redacted
from wml_ray.tracking.runs import MetricLogger, TrackedRun, finish_run, open_run
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
def test_a_server_that_restarts_during_a_run_misses_no_epoch(workplace, server):
    def restart():
        server.kill()
        server.start()

    result = train(tiny_config("optim.epochs=6"), at_epoch(2, restart))
    assert result.undelivered == 0
    for metric in ("train/loss", "val/accuracy/peer2"):
        run, steps = logged_steps(server, metric)
        assert steps == [1, 2, 3, 4, 5, 6]
    assert logged_steps(server, "test/accuracy/peer0")[1] == [6]
    assert run.info.status == "FINISHED"


def test_metrics_at_the_end_of_a_run_are_logged_again_only_if_they_changed(workplace):
    run = open_run("ends", "run", "token", {})
    for accuracy in (0.5, 0.5, 0.6):
        finish_run(run, "FINISHED", metrics={"best/accuracy": accuracy, "best/loss": 1.0})
    client = MlflowClient(run.uri)
    assert [entry.value for entry in client.get_metric_history(run.run_id, "best/accuracy")] == [0.5, 0.6]
    assert len(client.get_metric_history(run.run_id, "best/loss")) == 1


@pytest.mark.slow
def test_metrics_that_a_dead_server_missed_are_delivered_by_the_same_command(workplace, server, monkeypatch):
    monkeypatch.setattr("wml_ray.cluster.train.DELIVERY_S", 1.0)
    config = tiny_config("optim.epochs=4")
    result = train(config, at_epoch(2, server.kill))
    assert result.undelivered > 0
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


def test_logging_does_not_wait_for_a_response():
    """A thousand steps are logged while the first request is pending, and `log` sends no request itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        logger = MetricLogger(TrackedRun(f"http://127.0.0.1:{listener.getsockname()[1]}", "0", "none"))
        logger.log(0, {"train/loss": 1.0}, 0)
        listener.settimeout(60)
        request, _ = listener.accept()
        for step in range(1, 1000):
            logger.log(step, {"train/loss": 1.0}, 0)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert logger.close(timeout_s=0) == 1000
        request.close()


PASSWORDS = ["secret", "secret/x", "se/cret", "se?cret", "se#cret", "se@cret", "se?key=cret@secret"]


@pytest.mark.parametrize("password", PASSWORDS)
def test_no_part_of_a_password_in_the_address_is_printed(password):
    uri = f"http://someone:{password}@127.0.0.1:{free_port()}"
    with pytest.raises(UserError) as raised:
        check_reachable(uri)
    shown = [
        str(raised.value),
        TrackedRun(uri, "1", "2").command,
        redacted(f"postgresql://host/db?password={password}"),
    ]
    assert not [text for text in shown if "se/" in text or "cret" in text]


@pytest.mark.parametrize(
    ("uri", "printed"),
    [
        ("http://someone:se/cret@host:5000", "http://host:5000"),
        ("postgresql+psycopg://host/db?sslmode=require", "postgresql+psycopg://host/db"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_the_rest_of_the_address_is_printed(uri, printed):
    assert redacted(uri) == printed
