"""`wml-ray` whose workers and trials note the state of each rank and wait at gates.

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
from wml_ray.training import worker as training_worker
from wml_ray.training.events import EpochEnd
from wml_ray.training.trainer import Trainer

RESIZE_S = 2  # between two checks of an elastic run for new nodes
GATE_S = 120
plain_worker, plain_trial = ray_train.train_loop_per_worker, ray_tune.train_trial


class Place:
    """The folder through which trainers and a test exchange notes."""

    def __init__(self, storage_path: str | Path) -> None:
        self.folder = Path(storage_path).resolve() / "witness"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.notice = self.folder / "await-notice"

    def close_gate(self, epoch: int, workers: int) -> Path:
        """A group of `workers` workers waits in the middle of epoch `epoch` until the returned file is deleted."""
        gate = self.folder / f"gate-{epoch}-{workers}"
        gate.touch()
        return gate

    def waiting(self, epoch: int, workers: int) -> dict[int, int]:
        """Process ids by rank of the workers at that gate."""
        notes = [path.name.split("-")[3:] for path in self.folder.glob(f"at-{epoch}-{workers}-*")]
        return {int(rank): int(pid) for rank, pid in notes}

    def seen(self) -> list[dict]:
        """The state of each rank at the end of each epoch: epoch, workers, rank, digest."""
        return [json.loads(line) for path in self.folder.glob("seen-*") for line in path.read_text().splitlines()]

    def await_notice(self) -> None:
        """Training waits at its first check for a notice of preemption until there is one."""
        self.notice.touch()

    def begin(self, epoch: int, step: int) -> None:
        beside = self.folder / f".begun-{os.getpid()}"
        beside.write_text(json.dumps([epoch, step]))
        beside.rename(self.folder / f"begun-{os.getpid()}")

    def begun(self) -> list[tuple[int, int]]:
        """Epochs done, and steps done of the next, at each start of a training process."""
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
    """Replaces the function that Ray Train runs on each worker."""
    with watched(Place(settings["config"]["run"]["storage_path"])):
        plain_worker(settings)


def trial(settings: dict, **worker_environment: object) -> None:
    """Replaces the function that Ray Tune runs for each trial."""
    with watched(Place(Path(json.loads(settings["config"])["run"]["storage_path"]).parent.parent)):
        plain_trial(settings, **worker_environment)


@contextmanager
def watched(place: Place) -> Iterator[None]:
    """Workers started inside train with a `WatchedTrainer`."""

    class Watched(WatchedTrainer):
        notes = place

    with mock.patch.object(training_worker, "Trainer", Watched):
        yield


class WatchedTrainer(Trainer):
    """A trainer that notes its start and the end of each epoch, and waits at gates and for a notice of preemption."""

    notes: Place

    def fit(self, report, preempted=None, save=None):
        self.notes.begin(self.epoch, self.step)

        def preempted_at_last():
            while self.notes.notice.exists():
                if preempted():
                    self.notes.notice.unlink()
                    return True
                time.sleep(0.02)
            return preempted()

        def report_and_note(event):
            if isinstance(event, EpochEnd):
                line = {"epoch": event.epoch, "workers": self.worker.world_size, "rank": self.worker.rank}
                self.notes.write({**line, "digest": digest(self)})
            report(event)

        super().fit(report_and_note, preempted_at_last, save)

    def train_step(self, context, batch):
        if self.step == self.dataset.steps_per_epoch // 2:
            self.notes.pass_gate(context.epoch + 1, self.worker.world_size, self.worker.rank)
        return super().train_step(context, batch)


def digest(trainer: Trainer) -> str:
    """SHA-256 of all tensors of the method: parameters, running statistics and omega."""
    found = hashlib.sha256()
    for name, tensor in sorted(trainer.method.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    ray_train.ScalingConfig = partial(ray_train.ScalingConfig, elastic_resize_monitor_interval_s=RESIZE_S)
    ray_train.train_loop_per_worker = worker
    ray_tune.train_trial = trial
    return run_command(sys.argv[1:])


if __name__ == "__main__":
    import witness  # under the name by which the workers import it

    sys.exit(witness.main())
