"""Runs started in processes of their own, and read back from MLflow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deadline import DEADLINE_S
from mlflow import MlflowClient
from safetensors.torch import load_file

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.cli.main import main
from wml_ray.storage.lease import LEASE_FILE

TESTS = Path(__file__).parent


def client():
    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/mlflow.db"))


def only_run(name="wml"):
    (run,) = client().search_runs([client().get_experiment_by_name(name).experiment_id])
    return run


def steps(run, metric):
    return [entry.step for entry in client().get_metric_history(run.info.run_id, metric)]


def ignore(event):
    pass


def assert_bit_equal(one, other):
    for name in ("model.safetensors", "trainer.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours)


MEASURED = ("seconds", "per_second", "_bytes")  # ends of the names of metrics that differ between equal trainings


def history_of(result):
    """The epochs of a result with the metrics that an equal training repeats."""
    return [
        (entry["epoch"], {key: value for key, value in entry["metrics"].items() if not key.endswith(MEASURED)})
        for entry in result["history"]
    ]


def assert_logged_once(run, result):
    """MLflow has every metric of every epoch of this result once, and each of the others once."""
    logged = {key: client().get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    epochs = {
        key: [(entry["epoch"], entry["metrics"][key]) for entry in result["history"]]
        for key in result["history"][0]["metrics"]
    }
    assert {key: [(entry.step, entry.value) for entry in logged.pop(key)] for key in epochs} == epochs
    assert not {key: entries for key, entries in logged.items() if len(entries) != 1}
    assert {f"test/accuracy/peer{peer['peer']}" for peer in result["peers"]} <= logged.keys()
    assert run.info.status == "FINISHED"


def train_here(config, folder, environment):
    """`wml-ray train` of a config's text in a folder, in a process that was forked for it."""
    os.chdir(folder)
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    Path("config.yaml").write_text(config)
    sys.exit(main(["train", "config.yaml"]))


def start_training():
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "wml_ray", "train", "config.yaml"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
    )


def wait_for_epoch(checkpoints, epoch, process, timeout_s=DEADLINE_S):
    deadline_s = time.monotonic() + timeout_s
    while not checkpoints.epochs() or checkpoints.epochs()[-1] < epoch:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def interrupt_training(config, number):
    """Start `wml-ray train` of this config, and send it SIGINT or SIGTERM after its first epoch."""
    Path("config.yaml").write_text(config.to_yaml())
    process = start_training()
    wait_for_epoch(Checkpoints(config.run_folder / "checkpoints", 2), 1, process)
    errors = end(process, number)
    assert "the same command continues" in errors
    assert only_run().info.status == "KILLED"
    assert not (config.run_folder / LEASE_FILE).exists()


def end(process, number):
    """Send a process SIGINT or SIGTERM; returns what it writes to stderr."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == {signal.SIGINT: 1, signal.SIGTERM: 143}[number], errors
    assert "Traceback" not in errors
    return errors
