"""Checkpoints: safetensors and JSON in a folder an epoch, written beside and renamed, checked by digest, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

SELECTION_METRIC = "val/accuracy/ensemble_weighted"
DIGESTS = "SHA256SUMS"  # `sha256sum -c SHA256SUMS` checks a checkpoint by hand
_FOLDER = re.compile(r"epoch-(\d{4,})")


class Damaged(RuntimeError):
    """A checkpoint whose files are missing, cut short or changed."""


@dataclass(frozen=True)
class Checkpoint:
    """One epoch's end. `plan` is JSON: config, sharing, channel plan, epoch, metrics and the history up to here."""

    epoch: int
    model: dict[str, Tensor]
    state: dict[str, Tensor]
    plan: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by the weighted ensemble's validation accuracy."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write beside, then rename: a reader sees the whole checkpoint or none, whatever kills the writer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.writing"):
            shutil.rmtree(leftover, ignore_errors=True)
        target = self._path(checkpoint.epoch)
        beside = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{target.name}-", suffix=".writing"))
        save_file(_plain(checkpoint.model), beside / "model.safetensors")
        save_file(_plain(checkpoint.state), beside / "trainer.safetensors")
        (beside / "plan.json").write_text(json.dumps(checkpoint.plan, indent=1))
        names = ("model.safetensors", "trainer.safetensors", "plan.json")
        (beside / DIGESTS).write_text("".join(f"{_digest(beside / name)}  {name}\n" for name in names))
        for path in [*beside.iterdir(), beside]:
            _flush(path)
        for epoch in self.epochs():
            if epoch >= checkpoint.epoch:  # damaged, or the run would not have gone back behind it
                shutil.rmtree(self._path(epoch))
        beside.rename(target)
        _flush(self.folder)
        self._drop_old(best_epoch(checkpoint.plan["history"]))

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; a damaged one is passed over with a warning."""
        for epoch in reversed(self.epochs()):
            try:
                return self.load(epoch)
            except Damaged as error:
                warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
        return None

    def load(self, epoch: int) -> Checkpoint:
        """Raises:
        Damaged: the checkpoint's files do not match their digests.
        """
        folder = self._path(epoch)
        try:
            lines = (folder / DIGESTS).read_text().splitlines()
            digests = {name: digest for digest, name in (line.split("  ") for line in lines)}
            names = ("model.safetensors", "trainer.safetensors", "plan.json")
            damaged = [name for name in names if digests.get(name) != _digest(folder / name)]
        except (OSError, ValueError) as error:
            raise Damaged(f"checkpoint {folder} is damaged ({error})") from error
        if damaged:
            raise Damaged(f"checkpoint {folder} is damaged ({damaged[0]} does not match its digest)")
        plan = json.loads((folder / "plan.json").read_text())
        model, state = load_file(folder / "model.safetensors"), load_file(folder / "trainer.safetensors")
        return Checkpoint(epoch, model, state, plan)

    def epochs(self) -> list[int]:
        """Epochs that have a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        found = (_FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}"

    def _drop_old(self, best: int | None) -> None:
        for epoch in self.epochs()[: -self.keep]:
            if epoch != best:
                shutil.rmtree(self._path(epoch), ignore_errors=True)


def best_epoch(history: list[dict[str, Any]]) -> int | None:
    """The epoch of the highest validation accuracy of the weighted ensemble, the latest of equals."""
    scored = [(entry["metrics"][SELECTION_METRIC], entry["epoch"]) for entry in history]
    return max(scored)[1] if scored else None


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename, so that the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    beside.write_text(json.dumps(value, indent=1))
    _flush(beside)
    beside.replace(path)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
