"""The checkpoints of one run, in a local folder or in remote storage."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from wml_ray.checkpoints.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    epoch_folder,
    epochs_of,
    read_checkpoint,
    write_checkpoint,
)
from wml_ray.checkpoints.remote import Uploader, uploaded_epochs
from wml_ray.storage.lease import Lease
from wml_ray.storage.paths import is_remote
from wml_ray.storage.retry import STORAGE_TIMEOUT_S, retry_storage, storage_unavailable

INTERRUPTED_UPLOAD_S = 5.0  # how long an interrupted training waits for its uploads


def stored_epochs(folder: Path) -> list[int]:
    """Epochs with a checkpoint in a run's folder of checkpoints, in order; without those whose upload was cut off.

    Raises:
        StorageUnavailable: the storage failed for ten minutes.
    """
    if is_remote(folder):
        return retry_storage(lambda: uploaded_epochs(folder), folder)
    return retry_storage(lambda: epochs_of(folder.iterdir()) if folder.is_dir() else [], folder)


class Checkpoints:
    """The newest `keep` checkpoints of a run, and the best by `SELECTION_METRIC`."""

    def __init__(self, folder: Path, keep: int, lease: Lease | None = None, keep_damaged: bool = True) -> None:
        """Only a process that holds `lease` may write; None allows every process to write.

        A saved checkpoint replaces those of the same and of later epochs; `keep_damaged` moves them to `damaged/`.
        """
        self.folder, self.keep, self.lease, self.keep_damaged = folder, keep, lease, keep_damaged
        self._uploader: Uploader | None = None

    def path(self, epoch: int) -> Path:
        """The folder of an epoch's checkpoint."""
        return epoch_folder(self.folder, epoch)

    def epochs(self) -> list[int]:
        """Epochs with a checkpoint, in order; those whose upload was cut off are left out."""
        return stored_epochs(self.folder)

    def load(self, epoch: int) -> Checkpoint:
        """Read a checkpoint, retrying while the storage fails.

        Raises:
            DamagedCheckpoint: it has missing, changed or unreadable files.
            StorageUnavailable: the storage failed for ten minutes.
        """
        checkpoint = read_checkpoint(self.path(epoch))
        if checkpoint.epoch != epoch:
            raise DamagedCheckpoint(f"checkpoint {self.path(epoch)} is damaged (it is of epoch {checkpoint.epoch})")
        return checkpoint

    def latest(self, check: Callable[[Checkpoint], None] = lambda _: None) -> Checkpoint | None:
        """The newest intact checkpoint that passes `check`, which may raise `DamagedCheckpoint`; None if none does.

        Each one that is passed over is shown in a warning.
        """
        for epoch in reversed(self.epochs()):
            try:
                checkpoint = self.load(epoch)
                check(checkpoint)
                return checkpoint
            except DamagedCheckpoint as error:
                warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint to the local folder, or to the local disk from where a thread uploads it.

        Raises:
            LeaseLost: another process has taken the run over.
            OSError: the disk cannot be written, or is full.
        """
        if is_remote(self.folder):
            self._uploader = self._uploader or Uploader(self.folder, self.keep, self.lease, self.keep_damaged)
            self._uploader.put(checkpoint)
            return
        if self.lease:
            self.lease.check()
        write_checkpoint(checkpoint, self.folder, self.keep, self.keep_damaged)

    def wait_for_uploads(self) -> None:
        """Return when all saved checkpoints are in the run's folder.

        Raises:
            LeaseLost: another process has taken the run over.
            StorageUnavailable: no upload succeeded for ten minutes.
        """
        uploader, left = self._uploader, self._finish(STORAGE_TIMEOUT_S)
        if uploader and uploader.lost:
            raise uploader.lost
        if left:
            raise storage_unavailable(f"{self.folder}: the last checkpoints were not uploaded")

    def close(self) -> None:
        """Give up uploads that do not succeed within a few seconds, with a warning."""
        if self._finish(INTERRUPTED_UPLOAD_S):
            warnings.warn(f"{self.folder}: the newest checkpoint was not uploaded", stacklevel=2)

    def _finish(self, timeout_s: float) -> int:
        uploader, self._uploader = self._uploader, None
        return uploader.finish(timeout_s) if uploader else 0
