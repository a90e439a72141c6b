"""Checkpoints in remote storage: saved on this machine, and uploaded from there while the training goes on."""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path

from wml_ray.checkpoints.checkpoint import DIGESTS, FILES, Checkpoint, Checkpoints, best_epoch
from wml_ray.storage.files import put_files, remove_tree, staging_folder
from wml_ray.storage.lease import Lease, LeaseLost
from wml_ray.storage.paths import is_remote
from wml_ray.storage.retry import STORAGE_TIMEOUT_S, RetryQueue, storage_unavailable

INTERRUPTED_UPLOAD_S = 5.0  # how long an interrupted training waits for its uploads
UPLOAD_FAILED = "the storage takes no checkpoint ({}); training goes on, checkpoints wait on this machine"


def open_checkpoints(folder: Path, keep: int, lease: Lease | None = None) -> Checkpoints:
    """The checkpoints of one run, wherever its folder is."""
    return (UploadedCheckpoints if is_remote(folder) else Checkpoints)(folder, keep, lease)


class UploadedCheckpoints(Checkpoints):
    """What waits for the storage is what would be kept there: the newest, and the best. The rest is never uploaded."""

    _uploads: RetryQueue | None = None
    _here: Checkpoints
    _replaced: LeaseLost | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Returns when it is on this machine's disk; a thread uploads it.

        Raises:
            LeaseLost: another process has taken the run over.
        """
        if self._replaced:
            raise self._replaced
        if self._uploads is None:
            self._here = Checkpoints(staging_folder(self.folder), self.keep)
            self._uploads = RetryQueue(UPLOAD_FAILED)
        self._here.save(checkpoint)
        best = best_epoch(checkpoint.plan["history"])
        self._uploads.put(partial(self._upload, checkpoint.epoch, best))

    def wait_for_uploads(self) -> None:
        """Raises:
        LeaseLost: another process has taken the run over.
        StorageUnavailable: the storage took nothing for ten minutes.
        """
        left = self._finish(STORAGE_TIMEOUT_S)
        if self._replaced:
            raise self._replaced
        if left:
            raise storage_unavailable(self.folder, "the last checkpoints are not there")

    def close(self) -> None:
        """Give up what is not uploaded in a few seconds."""
        if self._finish(INTERRUPTED_UPLOAD_S):
            warnings.warn(f"{self.folder}: the newest checkpoint was not uploaded", stacklevel=2)

    def _finish(self, timeout_s: float) -> int:
        """How many saved checkpoints the storage has not taken."""
        if self._uploads is None:
            return 0
        left = self._uploads.close(timeout_s)
        self._uploads = None
        shutil.rmtree(self._here.folder, ignore_errors=True)
        return left

    def _upload(self, epoch: int, best: int | None) -> None:
        if self._replaced or not self._here.path(epoch).exists():  # newer ones have made it superfluous
            return
        try:
            if self.lease:
                self.lease.check()
            self._replace(epoch, best)
        except LeaseLost as error:
            self._replaced = error
        except FileNotFoundError:
            if self._here.path(epoch).exists():
                raise

    def _replace(self, epoch: int, best: int | None) -> None:
        begun = [int(path.name.removeprefix("epoch-")) for path in self.folder.glob("epoch-*")]
        for later in begun:
            if later >= epoch:  # cut off or damaged, or the run would not have gone back behind it
                self._remove(later)
        put_files(self._here.path(epoch), FILES, self.path(epoch))
        cut_off = {earlier for earlier in begun if earlier < epoch} - set(self.epochs())
        for earlier in cut_off.union(self.outdated(best)):
            self._remove(earlier)

    def _remove(self, epoch: int) -> None:
        (self.path(epoch) / DIGESTS).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
        remove_tree(self.path(epoch))
