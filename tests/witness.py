"""`wml-ray` with witnesses in its workers and trials: they write down what each rank holds, and wait at gates.

python -m witness train c.yaml
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from wml_ray.cli.main import main as run_command
from wml_ray.cluster import train as ray_train
from wml_ray.cluster import tune as ray_tune
from wml_ray.training.events import EpochEnd
from wml_ray.training.trainer import Trainer

RESIZE_S = 2  # between two looks for nodes that have come
GATE_S = 120
plain_worker, plain_trial = ray_train.train_loop_per_worker, ray_tune.train_trial


class Place:
    """Where witnesses and a test leave each other notes."""

    def __init__(self, storage_path: str | Path) -> None:
        self.folder = Path(storage_path).resolve() / "witness"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.notice = self.folder / "await-notice"

    def close_gate(self, epoch: int, workers: int) -> Path:
        """A group of so many workers is to wait in the middle of that epoch until the returned file is gone."""
        gate = self.folder / f"gate-{epoch}-{workers}"
        gate.touch()
        return gate

    def waiting(self, epoch: int, workers: int) -> dict[int, int]:
        """Process ids by rank of the workers at that gate."""
        notes = [path.name.split("-")[3:] for path in self.folder.glob(f"at-{epoch}-{workers}-*")]
        return {int(rank): int(pid) for rank, pid in notes}

    def seen(self) -> list[dict]:
        """What each rank held at the end of each epoch: epoch, workers, rank, digest."""
        return [json.loads(line) for path in self.folder.glob("seen-*") for line in path.read_text().splitlines()]

    def await_notice(self) -> None:
        """Training is to stand still where it first looks for a notice of preemption, until there is one."""
        self.notice.touch()

    def begin(self, epoch: int, step: int) -> None:
        beside = self.folder / f".begun-{os.getpid()}"
        beside.write_text(json.dumps([epoch, step]))
        beside.rename(self.folder / f"begun-{os.getpid()}")

    def begun(self) -> list[tuple[int, int]]:
        """Where training began, each time a process did: whole epochs done, and steps of the next."""
        return sorted(tuple(json.loads(path.read_text())) for path in self.folder.glob("begun-*"))

    def pass_gate(self, epoch: int, workers: int, rank: int) -> None:
        gate = self.folder / f"gate-{epoch}-{workers}"
        if not gate.exists():
            return
        (self.folder / f"at-{epoch}-{workers}-{rank}-{os.getpid()}").touch()
        deadline_s = time.monotonic() + GATE_S
        while gate.exists():
            assert time.monotonic() < deadline_s, f"{gate.name} stayed closed"
            time.sleep(0.02)

    def write(self, line: dict) -> None:
        with (self.folder / f"seen-{os.getpid()}").open("a") as file:
            file.write(json.dumps(line) + "\n")


def worker(settings: dict) -> None:
    """What Ray Train runs on each worker."""
    with watched(Place(settings["config"]["run"]["storage_path"])):
        plain_worker(settings)


def trial(settings: dict, **worker_environment: object) -> None:
    """What Ray Tune runs for each trial."""
    with watched(Place(Path(json.loads(settings["config"])["run"]["storage_path"]).parent.parent)):
        plain_trial(settings, **worker_environment)


@contextmanager
def watched(place: Place) -> Iterator[None]:
    plain_fit, plain_step = Trainer.fit, Trainer._train_step

    def fit(trainer, report, preempted, save):
        place.begin(trainer.epoch, trainer.step)

        def noticed():
            while place.notice.exists():  # stands still until it has come
                if preempted():
                    place.notice.unlink()
                    return True
                time.sleep(0.02)
            return preempted()

        def reported(event):
            if isinstance(event, EpochEnd):
                worker = trainer.worker
                line = {"epoch": event.epoch, "workers": worker.world_size, "rank": worker.rank}
                place.write({**line, "digest": digest(trainer)})
            report(event)

        plain_fit(trainer, reported, noticed, save)

    def step(trainer, number, batch):
        epoch, within = divmod(number, trainer.dataset.steps_per_epoch)
        if within == trainer.dataset.steps_per_epoch // 2:
            place.pass_gate(epoch + 1, trainer.worker.world_size, trainer.worker.rank)
        return plain_step(trainer, number, batch)

    with mock.patch.object(Trainer, "fit", fit), mock.patch.object(Trainer, "_train_step", step):
        yield


def digest(trainer: Trainer) -> str:
    """Of all tensors of the tree, running statistics included, and of omega."""
    tensors = {**trainer.model_state(), "omega": trainer.log_weights_M}
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    ray_train.ScalingConfig = partial(ray_train.ScalingConfig, elastic_resize_monitor_interval_s=RESIZE_S)
    ray_train.train_loop_per_worker = worker
    ray_tune.train_trial = trial
    return run_command(sys.argv[1:])


if __name__ == "__main__":
    import witness  # under the name that the workers know it by

    sys.exit(witness.main())
