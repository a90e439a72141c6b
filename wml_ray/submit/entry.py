"""The environment of a Ray job: its variables, its working directory and its SIGTERM handler."""

from __future__ import annotations

import json
import os
import signal
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
    """Move to a lasting folder, join the cluster, and let `ray job stop` act as Ctrl-C.

    Raises:
        UserError: the cluster cannot be joined.
    """
    from wml_ray.cluster.connect import join_cluster

    leave_ray_working_dir()
    join_cluster(verbose)
    _handle_sigterm_as_ctrl_c()  # after ray.init, which installs a SIGTERM handler of its own


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


def _handle_sigterm_as_ctrl_c() -> None:
    """Raise KeyboardInterrupt on SIGTERM, which `ray job stop` sends, so that MLflow shows KILLED.

    Ray Train's own handler of Ctrl-C is not used: it needs more than the 3 s that Ray gives a job by default, and the
    actors of a job end with its driver.
    """

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal does not interrupt the clean-up
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
