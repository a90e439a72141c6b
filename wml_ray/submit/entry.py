"""The environment of a Ray job: its variables and its working directory."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

ENVIRONMENT_FILE = ".wml_ray-environment.json"  # in the package beside wml_ray/
SUBMITTED_FROM = "WML_RAY_SUBMITTED_FROM"  # HOST:FOLDER of `wml-ray submit`


def in_ray_job() -> bool:
    """True in the process that Ray starts as a job's entrypoint."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def apply_environment() -> None:
    """Set the variables that `wml-ray submit` passed on. Ray calls this in every worker of the job."""
    path = Path(__file__).resolve().parents[2] / ENVIRONMENT_FILE
    if path.exists():
        os.environ.update(json.loads(path.read_text()))


def enter_ray_job(verbose: bool) -> None:
    """Move to a lasting folder and join the cluster.

    Raises:
        UserError: the cluster cannot be joined.
    """
    from wml_ray.cluster.connect import join_cluster

    leave_ray_working_dir()
    join_cluster(verbose)


def leave_ray_working_dir() -> None:
    """Leave a working directory that Ray made and will delete, so that relative folders and mlflow.db outlive the job.

    The new one is the folder of `wml-ray submit` if that is on this host, else ~/wml_ray_jobs.
    """
    if "working_dir_files" not in Path.cwd().parts:
        return
    host, _, folder = os.environ.get(SUBMITTED_FROM, "").partition(":")
    here = host == socket.gethostname() and os.access(folder, os.W_OK)
    lasting = Path(folder) if here else Path.home() / "wml_ray_jobs"
    lasting.mkdir(parents=True, exist_ok=True)
    os.chdir(lasting)
    print(f"relative paths start at {lasting}", flush=True)
