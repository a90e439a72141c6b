"""One process at a time in a folder: a lease file there, renewed by heartbeats and checked before each write.

filelock's SoftFileLease does not serve: it has no object stores, breaks the lease of a process in another PID namespace
of the same host, and does not tell a file that cannot be read from one that is missing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from wml_ray.errors import UserError, root_cause
from wml_ray.storage.files import get_text, put_text, storage_error
from wml_ray.storage.paths import is_remote, missing_parents, remove_empty
from wml_ray.storage.retry import StorageUnavailable

LEASE_FILE = "owner.json"
LOCK_FILE = ".owner.json.lock"  # held by a process of this machine while it takes the lease
HEARTBEAT_S = 10.0
STALE_S = 60.0  # without a heartbeat, after which a process of another machine may take a lease over
SUSPENDED_S = 600.0  # the same on the same machine, while the process exists
SETTLE_S = 1.0  # after which a write of another process is visible
RELEASE_TIMEOUT_S = 10.0  # how long the end of a process may be delayed by a storage that does not answer
_held: set[str] = set()  # tokens of this process


class LeaseLost(UserError):
    """Another process has taken the folder over, or the lease was deleted."""


@dataclass(frozen=True)
class Lease:
    """A process's lease on a folder. It is sent to the workers, which write there on behalf of that process."""

    folder: Path
    token: str

    def check(self) -> None:
        """Check, before each write, that the lease is still held.

        Raises:
            LeaseLost: another process has taken the folder over, or the lease was deleted.
        """
        owner = _read(self.folder)
        if owner is None:
            time.sleep(SETTLE_S)  # over NFS a file can be missing for a moment while it is replaced
            owner = _read(self.folder)
        if owner is None:
            raise LeaseLost(f"the lease {self.folder / LEASE_FILE} was deleted; nothing more is written")
        if owner.token not in (self.token, ""):
            raise LeaseLost(
                f"{self.folder} was taken over by process {owner.pid} on {owner.host}, as this process had sent no "
                f"heartbeat for {STALE_S:.0f} s; nothing more is written"
            )


@dataclass(frozen=True)
class _Owner:
    """The content of a lease file. The defaults are those of a damaged file, whose lease nobody holds."""

    token: str = ""
    host: str = ""
    machine: str = ""  # process ids are comparable within it
    pid: int = 0
    started: str = ""  # by which a process differs from an earlier one with the same id
    renewed_s: float = 0.0

    @classmethod
    def of_this_process(cls, token: str) -> _Owner:
        pid = os.getpid()
        return cls(token, socket.gethostname(), _machine(), pid, _start_time(pid))

    def is_alive(self) -> bool:
        """Whether its heartbeat is recent and the process, if it can be seen from here, runs."""
        silent_s = time.time() - self.renewed_s
        if self.machine == _machine():
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
            except PermissionError:
                pass  # another user's process
            if started := _start_time(self.pid):
                runs = started == self.started and (self.pid != os.getpid() or self.token in _held)
                return runs and silent_s < SUSPENDED_S
        return silent_s < STALE_S

    def write(self, folder: Path) -> None:
        put_text(folder / LEASE_FILE, self._renewed())

    def create(self, folder: Path) -> None:
        """Write the lease file if there is none.

        Raises:
            FileExistsError: there is one.
        """
        path: Any = folder / LEASE_FILE
        if is_remote(path):
            path.fs.pipe_file(path.path, self._renewed().encode(), mode="create")
            return
        temporary = path.with_name(f".{LEASE_FILE}.{self.token}")
        put_text(temporary, self._renewed())
        try:
            os.link(temporary, path)
        finally:
            temporary.unlink()

    def _renewed(self) -> str:
        return json.dumps(asdict(replace(self, renewed_s=time.time())), indent=1)


@contextmanager
def exclusive_access(folder: Path) -> Iterator[Lease]:
    """Hold the lease on the folder of a run or a study.

    After the end of a process, however it ends, another one on its machine can take the lease at once, and one on
    another machine after `STALE_S` without a heartbeat. A suspended process keeps it for `SUSPENDED_S` on its machine.

    Raises:
        UserError: another process holds the lease, or the folder cannot be written.
        LeaseLost: another process has taken it over.
    """
    folder = folder.resolve()
    owner = _Owner.of_this_process(uuid.uuid4().hex)
    _held.add(owner.token)
    try:
        try:
            made = missing_parents(folder)
            with nullcontext() if is_remote(folder) else FileLock(folder / LOCK_FILE, timeout=STALE_S):
                _acquire(folder, owner)
        except UserError:
            raise
        except Exception as error:  # of any client library
            raise storage_error(folder, error) from error
        with _heartbeats(folder, owner, made) as lease:
            yield lease
    finally:
        _held.discard(owner.token)


@contextmanager
def _heartbeats(folder: Path, owner: _Owner, made: list[Path]) -> Iterator[Lease]:
    """Renew an acquired lease in a thread; at the end release it and remove those folders of `made` that are empty."""
    lease, ended = Lease(folder, owner.token), threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(lease, owner, ended), name="lease", daemon=True)
    heartbeat.start()
    try:
        yield lease
    except Exception as error:
        if not isinstance(error, (LeaseLost, StorageUnavailable)):
            _raise_if_lost(lease)
        raise
    finally:
        ended.set()
        heartbeat.join(SETTLE_S)
        release = threading.Thread(target=_release, args=(lease, made), daemon=True)
        release.start()
        release.join(RELEASE_TIMEOUT_S)


def _acquire(folder: Path, owner: _Owner) -> None:
    holder = _read(folder)
    if holder is None:
        try:
            owner.create(folder)
            return
        except Exception:  # another process was faster, or this storage has no hard links or conditional writes
            holder = _read(folder)
    if holder and holder.token != owner.token and holder.is_alive():
        raise _in_use(folder, holder)
    owner.write(folder)
    time.sleep(SETTLE_S)
    holder = _read(folder)
    if holder and holder.token != owner.token:
        raise _in_use(folder, holder)


def _send_heartbeats(lease: Lease, owner: _Owner, ended: threading.Event) -> None:
    warned = False
    while not ended.wait(HEARTBEAT_S):
        try:
            lease.check()
            owner.write(lease.folder)
            warned = False
        except LeaseLost as error:
            warnings.warn(str(error), stacklevel=1)
            return
        except Exception as error:  # of any client library
            if not warned:
                warned = True
                warnings.warn(f"the lease on {lease.folder} cannot be renewed ({root_cause(error)})", stacklevel=1)


def _raise_if_lost(lease: Lease) -> None:
    """Raise `LeaseLost` if that is why a worker failed."""
    try:
        lease.check()
    except LeaseLost:
        raise
    except Exception as error:  # of any client library; the error of the worker is raised instead
        warnings.warn(f"the lease on {lease.folder} cannot be read ({root_cause(error)})", stacklevel=1)


def _release(lease: Lease, made: list[Path]) -> None:
    """Remove the lease, and those folders made for it that are still empty."""
    try:
        owner = _read(lease.folder)
        if owner and owner.token == lease.token:
            (lease.folder / LEASE_FILE).unlink()
            (lease.folder / LOCK_FILE).unlink(missing_ok=True)
        remove_empty(made)
    except Exception as error:  # of any client library
        warnings.warn(f"the lease on {lease.folder} is not removed ({root_cause(error)})", stacklevel=1)


def _read(folder: Path) -> _Owner | None:
    try:
        return _Owner(**json.loads(get_text(folder / LEASE_FILE)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        return _Owner()


def _machine() -> str:
    """The host, its boot and the PID namespace; on other systems than Linux the host."""
    try:
        boot, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()} {boot} {namespace}"


def _start_time(pid: int) -> str:
    """When a process of this machine started, in clock ticks since the boot; its state Z or X if it has ended.

    The result is empty if that cannot be read.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return state if state in "ZX" else fields[18]


def _in_use(folder: Path, owner: _Owner) -> UserError:
    return UserError(
        f"{folder} is in use by process {owner.pid} on {owner.host}; wait until it ends, or stop it; if that host is "
        f"down, wait {STALE_S:.0f} s or delete {folder / LEASE_FILE}"
    )
