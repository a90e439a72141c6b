"""One process at a time in a folder: by a lock among those of a machine, by a lease in the folder among all."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wml_ray.errors import UserError, root_cause
from wml_ray.storage.files import get_text, missing_parents, put_text, remove_empty, storage_error
from wml_ray.storage.paths import is_remote
from wml_ray.storage.retry import StorageUnavailable

LEASE_FILE = "owner.json"
HEARTBEAT_S = 10.0  # between two signs of life in a lease
STALE_S = 60.0  # a lease that was not renewed for so long is that of a dead process
SETTLE_S = 1.0  # in which two processes that lease a folder at once see each other
RELEASE_TIMEOUT_S = 10.0  # how long a process that ends waits to remove its lease


class LeaseLost(UserError):
    """Another process has taken the folder over."""


@dataclass(frozen=True)
class Lease:
    """A process's lease on a folder. It travels to the workers, who write there in its name."""

    folder: Path
    token: str

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            LeaseLost: the lease is another's now.
        """
        owner = _owner(self.folder)
        if owner and owner["token"] != self.token:
            raise LeaseLost(
                f"{self.folder} was taken over by process {owner['pid']} on {owner['host']}, as this one had given no "
                "sign of life; nothing more is written"
            )


@contextmanager
def exclusive_access(folder: Path) -> Iterator[Lease]:
    """Hold a run's or a study's folder, on this machine and on all others.

    The machine's lock falls with the process, however that ends, and its lease with it for those of this machine; for
    others a minute later.

    Raises:
        UserError: another process holds it.
        LeaseLost: another process has taken it over.
    """
    folder = folder.resolve()
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    try:
        with (
            FileLock(Path(tempfile.gettempdir()) / f"wml_ray-{os.getuid()}-{name}.lock", timeout=0),
            _leased(folder) as lease,
        ):
            yield lease
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait for it, or stop it first") from None


@contextmanager
def _leased(folder: Path) -> Iterator[Lease]:
    lease = Lease(folder, uuid.uuid4().hex)
    try:
        made = missing_parents(folder)
        _acquire(lease)
    except UserError:
        raise
    except Exception as error:  # of any client library
        raise storage_error(folder, error) from error
    ended = threading.Event()
    renewal = threading.Thread(target=_send_heartbeats, args=(lease, ended), name="lease", daemon=True)
    renewal.start()
    try:
        yield lease
    except Exception as error:
        if not isinstance(error, (LeaseLost, StorageUnavailable)):
            _raise_if_lease_lost(lease)
        raise
    finally:
        ended.set()
        renewal.join(SETTLE_S)
        preempted = threading.Thread(target=_release, args=(lease, made), daemon=True)
        preempted.start()
        preempted.join(RELEASE_TIMEOUT_S)  # a storage that hangs holds nobody up


def _acquire(lease: Lease) -> None:
    owner = _owner(lease.folder)
    if owner and _alive(owner):
        raise _in_use(lease.folder, owner)
    try:
        if owner is None and _create(lease):
            return
    except FileExistsError:  # another process was faster
        _acquire(lease)
        return
    put_text(lease.folder / LEASE_FILE, _heartbeat(lease))
    time.sleep(SETTLE_S)
    owner = _owner(lease.folder)
    if owner and owner["token"] != lease.token:
        raise _in_use(lease.folder, owner)


def _create(lease: Lease) -> bool:
    """Claim a folder that nobody has; False where the storage cannot tell who was first.

    Raises:
        FileExistsError: somebody has it now.
    """
    path = lease.folder / LEASE_FILE
    if is_remote(path):
        return False
    beside = path.with_name(f".{LEASE_FILE}.{lease.token}")
    put_text(beside, _heartbeat(lease))
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        return False
    finally:
        beside.unlink()
    return True


def _send_heartbeats(lease: Lease, ended: threading.Event) -> None:
    warned = False
    while not ended.wait(HEARTBEAT_S):
        try:
            lease.check()
            put_text(lease.folder / LEASE_FILE, _heartbeat(lease))
            warned = False
        except LeaseLost as error:
            warnings.warn(str(error), stacklevel=1)
            return
        except Exception as error:  # of any client library; the next try is near
            if not warned:
                warned = True
                warnings.warn(f"the lease on {lease.folder} waits ({root_cause(error)})", stacklevel=1)


def _raise_if_lease_lost(lease: Lease) -> None:
    """Raises:
    LeaseLost: the lease is another's, which is why a worker failed.
    """
    try:
        lease.check()
    except LeaseLost:
        raise
    except Exception as error:  # of any client library; the error that led here says more
        warnings.warn(f"the lease on {lease.folder} cannot be read ({root_cause(error)})", stacklevel=1)


def _release(lease: Lease, made: list[Path]) -> None:
    """Remove the lease, and the folders that were made for it and nothing else."""
    try:
        owner = _owner(lease.folder)
        if owner and owner["token"] == lease.token:
            (lease.folder / LEASE_FILE).unlink()
        remove_empty(made)
    except Exception as error:  # of any client library
        warnings.warn(f"the lease on {lease.folder} stays for a minute ({root_cause(error)})", stacklevel=1)


def _owner(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(get_text(folder / LEASE_FILE)))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a damaged lease is nobody's
        return None


def _alive(owner: dict[str, Any]) -> bool:
    if owner["host"] == socket.gethostname() and not _runs_here(owner["pid"]):
        return False
    return bool(time.time() - owner["renewed_s"] < STALE_S)


def _runs_here(pid: int) -> bool:
    """Whether a process of this machine other than this one has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _heartbeat(lease: Lease) -> str:
    return json.dumps(
        {"token": lease.token, "host": socket.gethostname(), "pid": os.getpid(), "renewed_s": time.time()}, indent=1
    )


def _in_use(folder: Path, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"{folder} is in use by process {owner['pid']} on {owner['host']}; wait for it, or stop it there; if it is "
        f"gone, wait {STALE_S:.0f} s or delete {folder / LEASE_FILE}"
    )
