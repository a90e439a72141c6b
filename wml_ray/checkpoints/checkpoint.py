"""Checkpoints: safetensors and JSON in a folder an epoch, written beside and renamed, checked by digest, no pickle."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from wml_ray.errors import UserError
from wml_ray.storage.files import flush, local_files
from wml_ray.storage.lease import Lease
from wml_ray.storage.paths import is_remote
from wml_ray.storage.retry import retry_for

SELECTION_METRIC = "val/accuracy/method"  # the prediction that the method selects by
DIGESTS = "SHA256SUMS"  # `sha256sum -c SHA256SUMS` checks a checkpoint by hand
FILES = ("model.safetensors", "trainer.safetensors", "plan.json", DIGESTS)  # the digests last: with them it is whole
_FOLDER = re.compile(r"epoch-(\d{4,})")


class DamagedCheckpoint(RuntimeError):
    """A checkpoint whose files are missing, cut short or changed."""


@dataclass(frozen=True)
class Checkpoint:
    """One epoch's end. `plan` is JSON: config, sharing, channel plan, epoch, metrics and the history up to here."""

    epoch: int
    model: dict[str, Tensor]
    state: dict[str, Tensor]
    plan: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by `SELECTION_METRIC`."""

    def __init__(self, folder: Path, keep: int, lease: Lease | None = None) -> None:
        """`lease` is what allows to write there."""
        self.folder, self.keep, self.lease = folder, keep, lease

    def save(self, checkpoint: Checkpoint) -> None:
        """Write beside, then rename: a reader sees the whole checkpoint or none, whatever kills the writer.

        Raises:
            LeaseLost: another process has taken the run over.
        """
        if self.lease:
            self.lease.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.writing"):
            shutil.rmtree(leftover, ignore_errors=True)
        target = self.path(checkpoint.epoch)
        beside = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{target.name}-", suffix=".writing"))
        save_file(_plain(checkpoint.model), beside / "model.safetensors")
        save_file(_plain(checkpoint.state), beside / "trainer.safetensors")
        (beside / "plan.json").write_text(json.dumps(checkpoint.plan, indent=1))
        (beside / DIGESTS).write_text("".join(f"{_digest(beside / name)}  {name}\n" for name in FILES[:-1]))
        for path in [*beside.iterdir(), beside]:
            flush(path)
        for epoch in self.epochs():
            if epoch >= checkpoint.epoch:  # damaged, or the run would not have gone back behind it
                shutil.rmtree(self.path(epoch))
        beside.rename(target)
        flush(self.folder)
        for epoch in self.outdated(best_epoch(checkpoint.plan["history"])):
            shutil.rmtree(self.path(epoch), ignore_errors=True)

    def wait_for_uploads(self) -> None:
        """Return when all that was saved is where every process finds it."""

    def close(self) -> None:
        """Save no more."""

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; a damaged one is passed over with a warning."""
        for epoch in reversed(self.epochs()):
            try:
                return self.load(epoch)
            except DamagedCheckpoint as error:
                warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
        return None

    def load(self, epoch: int) -> Checkpoint:
        """Raises:
        Damaged: the checkpoint's files do not match their digests.
        """
        try:
            with local_files(self.path(epoch), FILES) as folder:
                return _read(folder, epoch)
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"checkpoint {self.path(epoch)} is damaged ({error})") from error

    def epochs(self) -> list[int]:
        """Epochs that have a checkpoint, in order."""
        if is_remote(self.folder):  # one without digests was not uploaded to the end
            return _numbers(
                path.parent for path in retry_for(lambda: list(self.folder.glob(f"*/{DIGESTS}")), self.folder)
            )
        return _numbers(self.folder.iterdir()) if self.folder.is_dir() else []

    def path(self, epoch: int) -> Path:
        """The folder of an epoch's checkpoint."""
        return self.folder / f"epoch-{epoch:04d}"

    def outdated(self, best: int | None) -> list[int]:
        """Epochs whose checkpoints nobody needs."""
        return [epoch for epoch in self.epochs()[: -self.keep] if epoch != best]


def best_epoch(history: list[dict[str, Any]]) -> int | None:
    """The epoch of the highest `SELECTION_METRIC`, the latest of equals."""
    scored = [(entry["metrics"][SELECTION_METRIC], entry["epoch"]) for entry in history]
    return max(scored)[1] if scored else None


def _read(folder: Path, epoch: int) -> Checkpoint:
    lines = (folder / DIGESTS).read_text().splitlines()
    digests = {name: digest for digest, name in (line.split("  ") for line in lines)}
    for name in FILES[:-1]:
        if digests.get(name) != _digest(folder / name):
            raise ValueError(f"{name} does not match its digest")
    plan = json.loads((folder / "plan.json").read_text())
    model, state = load_file(folder / "model.safetensors"), load_file(folder / "trainer.safetensors")
    return Checkpoint(epoch, model, state, plan)


def _numbers(folders: Iterable[Path]) -> list[int]:
    found = (_FOLDER.fullmatch(path.name) for path in folders)
    return sorted(int(match.group(1)) for match in found if match)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
