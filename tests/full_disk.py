"""Runs on a file system that is full again and again: `unshare --map-root-user --mount python full_disk.py MODE`.

With MODE "enlarge" there is room again after each warning; with "stay" there is none at the start, and later none until
the run has ended. Warnings and errors about the full disk are printed. With "server" it is the disk of the MLflow
server, which is full from the second epoch until after the last.
"""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

from family import tiny_config
from runs import assert_logged_once, only_run
from servers import OUTAGE_S, Server

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.cli.main import main
from wml_ray.storage import retry
from wml_ray.storage.retry import StorageUnavailable
from wml_ray.training.events import EpochEnd
from wml_ray.verbs import train as verb

LARGE_BYTES, LEASE_ONLY_BYTES = 64 * 2**20, 32 * 2**10
CONFIG = tiny_config("optim.epochs=2")


def mount(size_bytes, *options):
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size_bytes}", *options]), "none", "results"]
    subprocess.run(command, check=True)


def fill(event):
    """Leave no free block at the end of an epoch."""
    if isinstance(event, EpochEnd):
        fill_disk()


def fill_disk():
    used = os.statvfs("results")
    mount((used.f_blocks - used.f_bfree) * used.f_frsize, "remount")


def enlarge():
    mount(LARGE_BYTES, "remount")


def on_a_full_disk(write):
    """The function, with no free block at its first call."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            fill_disk()
        return write(*arguments)

    return call


def enlarge_when_full():
    """There is no room for the first checkpoint, after each epoch, and for the report."""
    mount(LEASE_ONLY_BYTES, "remount")
    verb.write_files = on_a_full_disk(verb.write_files)
    verb.train(CONFIG, fill)


def print_warning(message, *_):
    if "no space left on" in str(message):
        print(message, flush=True)
        if sys.argv[1] == "enlarge":
            enlarge()


def stay():
    retry.STORAGE_TIMEOUT_S = 0.2
    mount(LEASE_ONLY_BYTES, "remount")
    Path("config.yaml").write_text(CONFIG.to_yaml())
    assert main(["train", "config.yaml"]) == 1
    enlarge()
    try:
        verb.train(CONFIG, fill)
    except StorageUnavailable as error:
        checkpoints = Checkpoints(CONFIG.run_folder / "checkpoints", 2)
        assert checkpoints.latest().epoch == checkpoints.epochs()[-1] == 1
        print(error)
    enlarge()
    assert main(["train", "config.yaml"]) == 0


def serve():
    """Train elsewhere, while the full disk is that of the server."""
    server = Server(Path("results").resolve())
    server.start()
    try:
        server.wait()
        os.environ["MLFLOW_TRACKING_URI"] = server.uri
        config = tiny_config("optim.epochs=6", "run.storage_path=elsewhere")

        def on_event(event):
            if isinstance(event, EpochEnd) and event.epoch == 2:
                fill(event)
            if isinstance(event, EpochEnd) and event.epoch == 6:
                threading.Timer(OUTAGE_S, enlarge).start()

        result = verb.train(config, on_event)
        assert result.undelivered == 0
        assert_logged_once(only_run(), result.record)
    finally:
        server.kill()


def print_all(message, *_):
    print(message, flush=True)


if __name__ == "__main__":
    os.mkdir("results")
    mount(LARGE_BYTES)
    retry.RETRY_S = 0.05
    warnings.showwarning = print_all if sys.argv[1] == "server" else print_warning
    warnings.simplefilter("always")
    if sys.argv[1] == "server":
        serve()
    else:
        enlarge_when_full() if sys.argv[1] == "enlarge" else stay()
