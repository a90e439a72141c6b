"""Connection to a Ray cluster, and the environment that the driver sends to its workers."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from wml_ray.config.schema import Config, DataConfig
from wml_ray.errors import UserError, one_line
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.storage.files import storage_environment
from wml_ray.storage.lease import Lease
from wml_ray.storage.paths import is_remote, to_path
from wml_ray.storage.runs import absolute_run
from wml_ray.tracking.client import tracking_environment
from wml_ray.tracking.runs import TrackedRun


def join_cluster(verbose: bool = False) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine; does nothing if one is connected.

    Raises:
        UserError: the cluster cannot be reached, or refuses the token.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        with _same_sigterm_handler():
            ray.init(
                address or "local",  # by default Ray looks for a cluster of this machine, and waits for one that died
                logging_level=logging.INFO if verbose else logging.ERROR,
                log_to_driver=verbose,
            )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"RAY_ADDRESS: cannot connect to the Ray cluster {f'at {address}' if address else 'on this machine'} "
            f"({one_line(error)}); check the address; with token authentication set "
            "RAY_AUTH_MODE=token and copy ~/.ray/auth_token here"
        ) from None


@contextmanager
def _same_sigterm_handler() -> Iterator[None]:
    """Put the handler of SIGTERM back that Ray replaces by one of its own, which exits; it also gets a SIGTERM
    that came meanwhile.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False
    try:
        yield
    except SystemExit:  # raised by Ray's handler
        came = True
    finally:
        signal.signal(signal.SIGTERM, handler)
    if came:
        signal.raise_signal(signal.SIGTERM)


@dataclass(frozen=True)
class WorkerEnvironment:
    """Import path, credentials, lease and MLflow run that the driver sends to its workers."""

    import_path: list[str]  # for the user's own code
    variables: dict[str, str] = field(repr=False)  # with secrets
    lease: Lease | None
    tracked: TrackedRun | None = field(default=None, repr=False)  # its address may hold a password

    @classmethod
    def capture(
        cls, folder: Path, data: DataConfig, lease: Lease | None, tracked: TrackedRun | None = None
    ) -> WorkerEnvironment:
        """The environment of this process, for a worker that reads `data` and writes into `folder`."""
        remote = is_remote(folder) or is_remote(to_path(data.root))
        credentials = storage_environment() if remote else {}
        return cls([path for path in sys.path if path], tracking_environment() | credentials, lease, tracked)

    def send(self) -> WorkerEnvironment | ray.ObjectRef:
        """A reference for the settings of a run or a trial, of which Ray keeps and exports copies: it has no secret.

        Without a cluster there are no such copies, and it is this object.
        """
        return ray.put(self) if ray.is_initialized() else self

    @classmethod
    def receive(cls, sent: WorkerEnvironment | ray.ObjectRef) -> WorkerEnvironment:
        """The environment that was sent."""
        return sent if isinstance(sent, cls) else ray.get(sent)

    def apply(self) -> None:
        """Extend the import path and the environment variables of this process."""
        sys.path.extend(path for path in self.import_path if path not in sys.path)
        os.environ.update(self.variables)


def ray_folder(folder: Path) -> Path:
    """A folder for Ray's own files, which are never read: in the run's folder, or local if that is remote."""
    if is_remote(folder):
        return Path(tempfile.gettempdir()) / f"wml_ray-{uuid.uuid4().hex}"
    return folder.resolve() / ".ray"


def with_absolute_paths(config: Config) -> dict[str, Any]:
    """The config as a dict for a worker, whose working directory is made by Ray."""
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(to_path(config.run.storage_path).resolve())
    raw["data"]["root"] = str(to_path(config.data.root).resolve())
    if config.teacher.run and config.method.name in TEACHER_METHODS:
        raw["teacher"]["run"] = absolute_run(config.teacher.run, config.run.storage_path)
    return raw
