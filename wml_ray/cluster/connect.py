"""Joining a Ray cluster, and the environment that workers inherit."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

from wml_ray.config.schema import Config
from wml_ray.errors import UserError, one_line
from wml_ray.storage.files import storage_environment
from wml_ray.storage.lease import Lease
from wml_ray.storage.paths import is_remote, to_path
from wml_ray.tracking.client import tracking_environment


def join_cluster(verbose: bool = False) -> None:
    """Raises:
    UserError: the cluster does not take us in.
    """
    if ray.is_initialized():
        return
    try:
        # "local": Ray would else look for a cluster that ran here last, and wait for one that was killed
        ray.init(
            os.environ.get("RAY_ADDRESS") or "local",
            logging_level=logging.INFO if verbose else logging.ERROR,
            log_to_driver=verbose,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "of this machine")
        raise UserError(
            f"RAY_ADDRESS: the Ray cluster {address} does not take us in ({one_line(error)}); check "
            "the address, and with token authentication set RAY_AUTH_MODE=token and copy ~/.ray/auth_token here"
        ) from None


@dataclass(frozen=True)
class WorkerEnvironment:
    """What a worker, perhaps on another node, takes over from the process that started it."""

    import_path: list[str]  # where the user's own backbone may lie
    environment: dict[str, str] = field(repr=False)  # secrets among it
    lease: Lease | None

    @classmethod
    def capture(cls, folder: Path, lease: Lease | None) -> WorkerEnvironment:
        """Of this process, for a worker that writes into `folder`."""
        of_storage = storage_environment() if is_remote(folder) else {}
        return cls([path for path in sys.path if path], tracking_environment() | of_storage, lease)

    def apply(self) -> None:
        sys.path.extend(path for path in self.import_path if path not in sys.path)
        os.environ.update(self.environment)


def ray_folder(folder: Path) -> Path:
    """Where Ray may keep what nobody reads: among a run's files, or on each node if those are in remote storage."""
    if is_remote(folder):
        return Path(tempfile.gettempdir()) / f"wml_ray-{uuid.uuid4().hex}"
    return folder.resolve() / ".ray"


def with_absolute_paths(config: Config) -> dict[str, Any]:
    """Settings for a worker, whose working directory is one that Ray made."""
    raw = config.model_dump(mode="json")
    raw["run"]["storage_path"] = str(to_path(config.run.storage_path).resolve())
    raw["data"]["root"] = str(Path(config.data.root).resolve())
    return raw
