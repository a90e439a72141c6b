"""Runs on a file system that is full again and again: `unshare --map-root-user --mount python full_disk.py MODE`.

With MODE "enlarge" there is room again after each warning; with "stay" there is none at the start, and later none until
the run has ended. Warnings and errors about the full disk are printed.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

from family import tiny_config

from wml_ray.checkpoints.store import Checkpoints
from wml_ray.cli.main import main
from wml_ray.storage import retry
from wml_ray.storage.retry import StorageUnavailable
from wml_ray.training.events import EpochEnd
from wml_ray.verbs.train import train

LARGE_BYTES, LEASE_ONLY_BYTES = 64 * 2**20, 32 * 2**10
CONFIG = tiny_config("optim.epochs=2")


def mount(size_bytes, *options):
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size_bytes}", *options]), "none", "results"]
    subprocess.run(command, check=True)


def fill(event):
    """Leave no free block at the end of an epoch."""
    if isinstance(event, EpochEnd):
        used = os.statvfs("results")
        mount((used.f_blocks - used.f_bfree) * used.f_frsize, "remount")


def enlarge():
    mount(LARGE_BYTES, "remount")


def print_warning(message, *_):
    if "no space left on" in str(message):
        print(message, flush=True)
        if sys.argv[1] == "enlarge":
            enlarge()


def stay():
    retry.STORAGE_TIMEOUT_S = 0.2
    mount(LEASE_ONLY_BYTES, "remount")
    Path("config.yaml").write_text(CONFIG.to_yaml())
    assert main(["train", "config.yaml"]) == 2
    enlarge()
    try:
        train(CONFIG, fill)
    except StorageUnavailable as error:
        checkpoints = Checkpoints(CONFIG.run_folder / "checkpoints", 2)
        assert checkpoints.latest().epoch == checkpoints.epochs()[-1] == 1
        print(error)
    enlarge()
    assert main(["train", "config.yaml"]) == 0


if __name__ == "__main__":
    os.mkdir("results")
    mount(LARGE_BYTES)
    retry.RETRY_S = 0.05
    warnings.showwarning = print_warning
    warnings.simplefilter("always")
    train(CONFIG, fill) if sys.argv[1] == "enlarge" else stay()
