"""Checkpoints for remote storage: written to the local disk and uploaded from there while the training continues."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from wml_ray.checkpoints.checkpoint import (
    DIGESTS,
    FILES,
    Checkpoint,
    best_epoch,
    damaged_folder,
    epoch_folder,
    epochs_of,
    outdated_epochs,
    write_checkpoint,
)
from wml_ray.storage.files import remove_tree
from wml_ray.storage.lease import Lease, LeaseLost
from wml_ray.storage.retry import RetryQueue

UPLOAD_FAILED = "no checkpoint can be uploaded ({}); training continues, checkpoints wait on this machine"


class Uploader:
    """Uploads a run's checkpoints in a thread. Only those waiting that would be kept in the storage are uploaded."""

    def __init__(self, folder: Path, keep: int, lease: Lease | None, keep_damaged: bool) -> None:
        """Only a process that holds `lease` may write into the remote `folder`."""
        self._folder, self._keep, self._lease, self._keep_damaged = folder, keep, lease, keep_damaged
        self._local = _staging_folder(folder)
        self._queue = RetryQueue(UPLOAD_FAILED)
        self._serials = itertools.count(1)  # of the saves: several may be of one epoch
        self._uploaded = 0  # the last of them
        self.lost: LeaseLost | None = None

    def put(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint to the local disk and queue its upload.

        Raises:
            LeaseLost: another process has taken the run over.
            OSError: the local disk cannot be written, or is full.
        """
        if self.lost:
            raise self.lost
        write_checkpoint(checkpoint, self._local, self._keep)
        best = best_epoch(checkpoint.metadata["history"])
        self._queue.put(partial(self._upload_if_kept, next(self._serials), checkpoint.epoch, best))

    def finish(self, timeout_s: float) -> int:
        """Wait until the uploads are done, or none succeeded for `timeout_s`; returns the uploads left."""
        left = self._queue.close(timeout_s)
        shutil.rmtree(self._local, ignore_errors=True)
        return left

    def _upload_if_kept(self, serial: int, epoch: int, best: int | None) -> None:
        if self.lost or not epoch_folder(self._local, epoch).exists():  # outdated by newer ones
            return
        try:
            if self._lease:
                self._lease.check()
            self._upload(serial, epoch, best)
        except LeaseLost as error:
            self.lost = error
        except FileNotFoundError:
            if epoch_folder(self._local, epoch).exists():
                raise

    def _upload(self, serial: int, epoch: int, best: int | None) -> None:
        whole = set(uploaded_epochs(self._folder))
        begun = epochs_of({path.parent for path in _files(self._folder)})
        if self._uploaded != serial:  # else only the removal below is retried
            for later in (other for other in begun if other >= epoch):
                if self._keep_damaged and later in whole:  # a resumed run could not read it
                    _copy(epoch_folder(self._folder, later), damaged_folder(self._folder, later))
                self._remove(later)
            for name in FILES:
                target: Any = epoch_folder(self._folder, epoch) / name
                target.fs.put_file(str(epoch_folder(self._local, epoch) / name), target.path)
            self._uploaded = serial
        cut_off = {earlier for earlier in begun if earlier < epoch} - whole
        for earlier in cut_off.union(outdated_epochs(uploaded_epochs(self._folder), self._keep, best)):
            self._remove(earlier)

    def _remove(self, epoch: int) -> None:
        folder = epoch_folder(self._folder, epoch)
        (folder / DIGESTS).unlink(missing_ok=True)  # first: without digests the rest is no checkpoint
        remove_tree(folder)


def uploaded_epochs(folder: Path) -> list[int]:
    """Epochs whose checkpoint was uploaded completely, which the digests show."""
    return epochs_of(path.parent for path in _files(folder) if path.name == DIGESTS)


def _files(folder: Any) -> list[PurePosixPath]:
    """The files of the checkpoints in a remote folder.

    It is one listing: `glob` asks for the folder again after it, and fails if the last file was removed in between.
    """
    root = PurePosixPath(folder.path)
    paths = (PurePosixPath(name) for name in folder.fs.find(folder.path))
    return [path for path in paths if path.parent.parent == root]


def _copy(source: Path, target: Path) -> None:
    for name in FILES:
        file: Any = source / name
        copy: Any = target / name
        if file.exists():
            file.fs.copy(file.path, copy.path)


def _staging_folder(folder: Path) -> Path:
    """An empty local folder for the uploads to `folder`; files that a killed process left there are removed."""
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    staging = Path(tempfile.gettempdir()) / f"wml_ray-{os.getuid()}-{name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    return staging
