"""One checkpoint: safetensors and JSON in a folder per epoch, renamed into place, checked by digest, no pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from wml_ray.errors import UserError, one_line, root_cause
from wml_ray.storage.files import check_regular, flush, local_files
from wml_ray.storage.retry import StorageUnavailable, retry_storage, storage_unavailable

SELECTION_METRIC = "val/accuracy/method"  # the prediction that the method selects by
DIGESTS = "SHA256SUMS"  # `sha256sum -c SHA256SUMS` checks a checkpoint by hand
FILES = ("model.safetensors", "trainer.safetensors", "plan.json", DIGESTS)  # in the order of upload: the digests last
UNREADABLE = (  # errors of reading damaged files; any other is one of the file system
    *(FileNotFoundError, NotADirectoryError, SafetensorError),
    *(ValueError, LookupError, TypeError, RecursionError),
)
_FOLDER = re.compile(r"epoch-(\d{4,})")


class DamagedCheckpoint(UserError):
    """A checkpoint with missing, changed or unreadable files, or one of another run."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `epoch` epochs.

    `metadata` is JSON: run id, config, sharing, channel widths, epoch, metrics and the history up to here.
    """

    epoch: int
    model: dict[str, Tensor]
    state: dict[str, Tensor]
    metadata: dict[str, Any]


def best_epoch(history: list[dict[str, Any]]) -> int | None:
    """The epoch with the highest `SELECTION_METRIC`, the latest of equals; None without a history."""
    scored = [(entry["metrics"][SELECTION_METRIC], entry["epoch"]) for entry in history]
    return max(scored)[1] if scored else None


def epoch_folder(folder: Path, epoch: int) -> Path:
    """The folder of one checkpoint among a run's checkpoints in `folder`."""
    return folder / f"epoch-{epoch:04d}"


def epochs_of(folders: Iterable[PurePath]) -> list[int]:
    """The epochs of those folders that are named as checkpoints, in order."""
    matches = (_FOLDER.fullmatch(path.name) for path in folders)
    return sorted(int(match.group(1)) for match in matches if match)


def outdated_epochs(epochs: list[int], keep: int, best: int | None) -> list[int]:
    """Epochs that are neither among the newest `keep` nor the best."""
    return [epoch for epoch in epochs[:-keep] if epoch != best]


def write_checkpoint(checkpoint: Checkpoint, folder: Path, keep: int, keep_damaged: bool = False) -> None:
    """Write a checkpoint into a run's local `folder` and remove those that are outdated.

    The checkpoint is renamed into place, so a reader finds all of it or nothing. It replaces those of the same
    and of later epochs; with `keep_damaged` they are moved to `damaged/`, as a resumed run could not read them.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.writing"):
        shutil.rmtree(leftover, ignore_errors=True)
    target = epoch_folder(folder, checkpoint.epoch)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{target.name}-", suffix=".writing"))
    _save_tensors(checkpoint.model, temporary / "model.safetensors")
    _save_tensors(checkpoint.state, temporary / "trainer.safetensors")
    (temporary / "plan.json").write_text(json.dumps(checkpoint.metadata, indent=1))
    (temporary / DIGESTS).write_text("".join(f"{_digest(temporary / name)}  {name}\n" for name in FILES[:-1]))
    for path in [*temporary.iterdir(), temporary]:
        flush(path)
    for epoch in epochs_of(folder.iterdir()):
        if epoch >= checkpoint.epoch:
            (folder / "damaged").mkdir(exist_ok=True)
            epoch_folder(folder, epoch).rename(damaged_folder(folder, epoch))
    temporary.rename(target)
    flush(folder)
    if not keep_damaged:
        shutil.rmtree(folder / "damaged", ignore_errors=True)
    for epoch in outdated_epochs(epochs_of(folder.iterdir()), keep, best_epoch(checkpoint.metadata["history"])):
        shutil.rmtree(epoch_folder(folder, epoch), ignore_errors=True)


def damaged_folder(folder: Path, epoch: int) -> Path:
    """A new name for the folder of a damaged checkpoint."""
    return folder / "damaged" / f"{epoch_folder(folder, epoch).name}-{uuid.uuid4().hex[:8]}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint from its folder and check its digests.

    Raises:
        DamagedCheckpoint: it has missing, changed or unreadable files.
        StorageUnavailable: the storage failed for ten minutes, or refuses access.
    """
    try:
        with local_files(folder, FILES) as local:
            return retry_storage(lambda: _read(local), local)
    except StorageUnavailable:
        raise
    except UNREADABLE as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged ({one_line(error)})") from error
    except OSError as error:
        raise storage_unavailable(f"{folder} cannot be read ({root_cause(error)})") from error


def _read(folder: Path) -> Checkpoint:
    for name in FILES:
        check_regular(folder / name)
    lines = (folder / DIGESTS).read_text().splitlines()
    digests = {name: digest for digest, name in (line.split("  ") for line in lines)}
    for name in FILES[:-1]:
        if digests.get(name) != _digest(folder / name):
            raise ValueError(f"{name} does not match its digest")
    metadata = json.loads((folder / "plan.json").read_text())
    model, state = load_file(folder / "model.safetensors"), load_file(folder / "trainer.safetensors")
    return Checkpoint(metadata["epoch"], model, state, metadata)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # of an operating system's error too, such as a full disk
        number = re.search(r"os error (\d+)", str(error))
        code = int(number.group(1)) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
