"""`python full_disk.py enlarge|stay SEED`: a run on a file system that is full again and again, in a mount namespace.

Every warning about the full disk is printed. With `enlarge` there is room again after it.
"""

import os
import subprocess
import sys
import warnings

from family import tiny_config

from wml_ray.cli import main as cli
from wml_ray.storage import retry
from wml_ray.training.events import EpochEnd
from wml_ray.verbs import train as verb

LARGE, ONLY_A_LEASE = 64 * 2**20, 32 * 2**10


def resize(size_bytes: int, *options: str) -> None:
    remount = ",".join(["remount", f"size={size_bytes}", *options])
    subprocess.run(["mount", "-o", remount, "results"], check=True)


def fill() -> None:
    """Leave no free block."""
    used = os.statvfs("results")
    resize((used.f_blocks - used.f_bfree) * used.f_frsize)


def main(then: str) -> int:
    os.mkdir("results")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ONLY_A_LEASE}", "none", "results"], check=True)
    retry.RETRY_S = 0.05
    if then == "stay":
        resize(LARGE)
        retry.STORAGE_TIMEOUT_S = 0.2

    def show(message, *_: object) -> None:
        if "no space left on" in str(message):
            print(message, flush=True)
            if then == "enlarge":
                resize(LARGE)

    warnings.showwarning = show
    warnings.simplefilter("always")

    def on_event(event: object) -> None:
        if isinstance(event, EpochEnd):
            fill()

    config = tiny_config("optim.epochs=2")
    if then == "enlarge":
        verb.train(config, on_event)
        return 0
    return cli.exit_code(lambda: verb.train(config, on_event))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
