"""A run or a study as the command of a Ray job: what happens on the cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from wml_ray.cli.main import main
from wml_ray.cli.output import FAILED, USER_ERROR
from wml_ray.errors import UserError

ENVIRONMENT = ".wml_ray-environment.json"
SUBMITTED_FROM = "WML_RAY_PLACE"  # HOST:FOLDER a job was submitted from


def on_cluster(verb: str, words: Sequence[str]) -> int:
    """The verb as a job's command: `words` as for `wml-ray`, from a working directory that Ray may have made."""
    try:
        take_environment()
        words = _move_to_place(words)
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            from wml_ray.cluster.connect import join_cluster

            join_cluster("--verbose" in words)  # ray.init puts a SIGTERM handler of its own in place of ours
        _end_as_by_ctrl_c()
        return main([verb, *words])
    except UserError as error:
        print(f"wml-ray: {error}", file=sys.stderr)
        return USER_ERROR
    except ModuleNotFoundError as error:
        print(
            f"wml-ray: this cluster's Python has no package '{error.name}'; start its nodes from an environment or "
            "image with requirements.lock installed, or submit with --packages",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        return FAILED


def take_environment() -> None:
    """Set what the submitter passed on. Ray calls this in every worker of a job, `on_cluster` in its driver."""
    path = Path(__file__).resolve().parents[2] / ENVIRONMENT
    if path.exists():
        os.environ.update(json.loads(path.read_text()))


def _move_to_place(words: Sequence[str]) -> list[str]:
    """Leave a working directory that Ray made and will delete, so that relative folders and mlflow.db outlive the job.

    They are taken from the folder the job was submitted from, if that is on this machine, else from ~/wml_ray_jobs.
    """
    if "working_dir_files" not in Path.cwd().parts:
        return list(words)
    words = [_with_whole_path(word) for word in words]
    host, _, folder = os.environ.get(SUBMITTED_FROM, "").partition(":")
    here = host == socket.gethostname() and os.access(folder, os.W_OK)
    place = Path(folder) if here else Path.home() / "wml_ray_jobs"
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    print(f"relative folders are in {place}", flush=True)
    return words


def _with_whole_path(word: str) -> str:
    """The word, with the whole path of the file that it names, alone or behind `--option=`."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).resolve()}" if value and Path(value).is_file() else word


def _end_as_by_ctrl_c() -> None:
    """`ray job stop` sends SIGTERM; what Ctrl-C leaves behind (KILLED in MLflow, a checkpoint) is right for it too.

    Ray Train's own handler of Ctrl-C is passed by: it takes longer than the 3 s that Ray gives a job by default, and
    the actors of a job end with its driver.
    """

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
