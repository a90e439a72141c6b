"""MLflow that fails in the middle of a run: nothing is lost, and nothing logged twice."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from family import tiny_config
from runs import assert_logged_once, only_run
from servers import OUTAGE_S, Server, proxied

from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train

TESTS = Path(__file__).parents[1]
LOCK = """
import sqlite3, sys
connection = sqlite3.connect("mlflow.db", timeout=60, isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def during_epochs(begin, end):
    """An event handler that calls `begin` after epoch 2, and `end` some seconds after the last one, epoch 6."""

    def on_event(event):
        if isinstance(event, EpochEnd) and event.epoch == 2:
            begin()
        if isinstance(event, EpochEnd) and event.epoch == 6:
            threading.Timer(OUTAGE_S, end).start()

    return on_event


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MLflow does not answer")
def test_a_database_that_another_process_locks_misses_no_metric(workplace, monkeypatch):
    monkeypatch.setattr("wml_ray.storage.retry.RETRY_S", 0.1)
    lockers = []

    def lock():
        process = subprocess.Popen(
            [sys.executable, "-c", LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "locked\n"
        lockers.append(process)

    run = train(tiny_config("optim.epochs=6"), during_epochs(lock, lambda: lockers[0].communicate()))
    assert lockers
    assert run.undelivered == 0
    assert_logged_once(only_run(), run.record)


@pytest.mark.slow
def test_a_server_that_answers_with_errors_for_a_while_misses_no_metric(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server, fails = Server(workplace), threading.Event()
    server.start()
    try:
        server.wait()
        with proxied(server, lambda _: 500 if fails.is_set() else None) as address:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            with pytest.warns(UserWarning, match="MLflow does not answer"):
                run = train(tiny_config("optim.epochs=6"), during_epochs(fails.set, fails.clear))
            assert run.undelivered == 0
            assert_logged_once(only_run(), run.record)
    finally:
        server.kill()


@pytest.mark.nightly
def test_a_server_whose_disk_is_full_for_a_while_misses_no_metric(workplace):
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces")
    done = subprocess.run(
        [*unshare, sys.executable, str(TESTS / "full_disk.py"), "server"],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MLflow does not answer" in done.stdout
