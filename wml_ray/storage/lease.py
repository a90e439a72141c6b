"""One process at a time in a folder: by a lock among those of a machine, by a claim in the folder among all."""

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

from wml_ray.config import UserError
from wml_ray.delivery import first_cause
from wml_ray.storage import Unanswered, get_text, is_remote, missing, put_text, remove_empty, unusable

OWNER = "owner.json"
RENEW_S = 10.0  # between two signs of life in a claim
STALE_S = 60.0  # a claim that was not renewed for so long is that of a dead process
SETTLE_S = 1.0  # in which two processes that claim a folder at once see each other
LEAVE_S = 10.0  # how long a process that ends waits to remove its claim


class Replaced(UserError):
    """Another process has taken the folder over."""


@dataclass(frozen=True)
class Claim:
    """A process's claim on a folder. It travels to the workers, who write there in its name."""

    folder: Path
    token: str

    def check(self) -> None:
        """To be called before anything is written.

        Raises:
            Replaced: the claim is another's now.
        """
        owner = _owner(self.folder)
        if owner and owner["token"] != self.token:
            raise Replaced(
                f"{self.folder} was taken over by process {owner['pid']} on {owner['host']}, as this one had given no "
                "sign of life; nothing more is written"
            )


@contextmanager
def only_one(folder: Path) -> Iterator[Claim]:
    """Hold a run's or a study's folder, on this machine and on all others.

    The machine's lock falls with the process, however that ends, and its claim with it for those of this machine; for
    others a minute later.

    Raises:
        UserError: another process holds it.
        Replaced: another process has taken it over.
    """
    folder = folder.resolve()
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    try:
        with (
            FileLock(Path(tempfile.gettempdir()) / f"wml_ray-{os.getuid()}-{name}.lock", timeout=0),
            _claimed(folder) as claim,
        ):
            yield claim
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait for it, or stop it first") from None


@contextmanager
def _claimed(folder: Path) -> Iterator[Claim]:
    claim = Claim(folder, uuid.uuid4().hex)
    try:
        made = missing(folder)
        _take(claim)
    except UserError:
        raise
    except Exception as error:  # of any client library
        raise unusable(folder, error) from error
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(claim, ended), name="claim", daemon=True)
    renewal.start()
    try:
        yield claim
    except Exception as error:
        if not isinstance(error, (Replaced, Unanswered)):
            _blame_replacement(claim)
        raise
    finally:
        ended.set()
        renewal.join(SETTLE_S)
        leaving = threading.Thread(target=_give_back, args=(claim, made), daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)  # a storage that hangs holds nobody up


def _take(claim: Claim) -> None:
    owner = _owner(claim.folder)
    if owner and _alive(owner):
        raise _in_use(claim.folder, owner)
    try:
        if owner is None and _create(claim):
            return
    except FileExistsError:  # another process was faster
        _take(claim)
        return
    put_text(claim.folder / OWNER, _sign_of_life(claim))
    time.sleep(SETTLE_S)
    owner = _owner(claim.folder)
    if owner and owner["token"] != claim.token:
        raise _in_use(claim.folder, owner)


def _create(claim: Claim) -> bool:
    """Claim a folder that nobody has; False where the storage cannot tell who was first.

    Raises:
        FileExistsError: somebody has it now.
    """
    path = claim.folder / OWNER
    if is_remote(path):
        return False
    beside = path.with_name(f".{OWNER}.{claim.token}")
    put_text(beside, _sign_of_life(claim))
    try:
        os.link(beside, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        return False
    finally:
        beside.unlink()
    return True


def _renew(claim: Claim, ended: threading.Event) -> None:
    warned = False
    while not ended.wait(RENEW_S):
        try:
            claim.check()
            put_text(claim.folder / OWNER, _sign_of_life(claim))
            warned = False
        except Replaced as error:
            warnings.warn(str(error), stacklevel=1)
            return
        except Exception as error:  # of any client library; the next try is near
            if not warned:
                warned = True
                warnings.warn(f"the claim on {claim.folder} waits ({first_cause(error)})", stacklevel=1)


def _blame_replacement(claim: Claim) -> None:
    """Raises:
    Replaced: the claim is another's, which is why a worker failed.
    """
    try:
        claim.check()
    except Replaced:
        raise
    except Exception as error:  # of any client library; the error that led here says more
        warnings.warn(f"the claim on {claim.folder} cannot be read ({first_cause(error)})", stacklevel=1)


def _give_back(claim: Claim, made: list[Path]) -> None:
    """Remove the claim, and the folders that were made for it and nothing else."""
    try:
        owner = _owner(claim.folder)
        if owner and owner["token"] == claim.token:
            (claim.folder / OWNER).unlink()
        remove_empty(made)
    except Exception as error:  # of any client library
        warnings.warn(f"the claim on {claim.folder} stays for a minute ({first_cause(error)})", stacklevel=1)


def _owner(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(get_text(folder / OWNER)))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a damaged claim is nobody's
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


def _sign_of_life(claim: Claim) -> str:
    return json.dumps(
        {"token": claim.token, "host": socket.gethostname(), "pid": os.getpid(), "renewed_s": time.time()}, indent=1
    )


def _in_use(folder: Path, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"{folder} is in use by process {owner['pid']} on {owner['host']}; wait for it, or stop it there; if it is "
        f"gone, wait {STALE_S:.0f} s or delete {folder / OWNER}"
    )
