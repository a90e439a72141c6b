"""Ray jobs of runs and studies: submitted, found, followed and stopped."""

from __future__ import annotations

import asyncio
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobSubmissionClient

from wml_ray.errors import UserError
from wml_ray.submit.client import cluster_errors
from wml_ray.submit.entry import SUBMITTED_FROM
from wml_ray.submit.job import Job
from wml_ray.submit.package import JOB_FILE, Package, own_modules, passed_environment, write_package

STOP_S = 30  # from the stop of a job until Ray kills it
UNREACHABLE_S = 60.0  # `follow_job` fails once the cluster has been unreachable for this time
NAME_KEY, FOLDER_KEY, COMMAND_KEY = "wml_ray.job", "wml_ray.folder", "wml_ray.command"  # in a job's metadata


@dataclass(frozen=True)
class Submission:
    """A job that was submitted, or `running`, an earlier job that works on the same run or study."""

    job_id: str
    running: JobDetails | None
    package: Package | None  # None in an image
    environment: Mapping[str, str]  # variables that the job needs


def submit(
    client: JobSubmissionClient, job: Job, command: str, image: str | None, packages: bool, include: Sequence[str]
) -> Submission:
    """Submit the job, or find the active one in the same folder. `command` is shown by `wml-ray jobs status`.

    Raises:
        UserError: the package is too large, the image cannot run the job, or the cluster refuses it.
    """
    if image:
        _check_image(job, include)
    key = f"{job.folder} (dry run)" if job.dry_run else job.folder  # a dry run and a training may run at once
    metadata = {NAME_KEY: job.name, FOLDER_KEY: key, COMMAND_KEY: command}
    entrypoint = shlex.join(["python", "-m", "wml_ray.cli.job", job.to_json() if image else JOB_FILE])
    with tempfile.TemporaryDirectory() as folder:
        package = None if image else write_package(job, Path(folder), include)
        while True:
            jobs = list_jobs(client)
            for other in jobs:
                if (other.metadata or {}).get(FOLDER_KEY) == key and not other.status.is_terminal():
                    return Submission(str(other.submission_id), other, None, {})
            job_id = _free_id(job.name, jobs)
            environment = runtime_env(package, image, packages)
            with cluster_errors(client.get_address()):
                try:
                    client.submit_job(
                        entrypoint=entrypoint, submission_id=job_id, runtime_env=environment, metadata=metadata
                    )
                except RuntimeError as error:
                    if "already exists" not in str(error):  # then another process submitted it since the list was read
                        raise
                else:
                    return Submission(job_id, None, package, passed_environment(job))


def runtime_env(package: Package | None, image: str | None, packages: bool) -> dict[str, Any]:
    """The Ray runtime environment of a job. Ray logs `env_vars` on every node, so no secret is among them."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), SUBMITTED_FROM: f"{socket.gethostname()}:{Path.cwd()}"}
    if image:
        return {"image_uri": image, "env_vars": variables}
    assert package is not None
    settings: dict[str, Any] = {
        "working_dir": str(package.folder),
        "env_vars": variables,
        "worker_process_setup_hook": "wml_ray.submit.entry.apply_environment",
    }
    if packages:
        lock = "-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.lock"  # too long for the variable Ray puts it in
        settings["pip"] = {"packages": [lock], "pip_check": False}
    return settings


def _check_image(job: Job, include: Sequence[str]) -> None:
    """Raise UserError if the results would be written inside the container, or files would have to be sent."""
    functions = job.config.user_functions
    if include or own_modules(functions):
        raise UserError(
            f"--image: {', '.join(include or functions.values())} cannot be sent with an image; build it into "
            "the image (a function in an installed package), or submit without --image"
        )
    if "://" not in job.config.run.storage_path:
        raise UserError(
            f"--image: run.storage_path = {job.config.run.storage_path} would be lost with the container; give an "
            "address such as s3://BUCKET/FOLDER, or start the nodes themselves from the image (KubeRay does)"
        )


def list_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """The submitted jobs of the cluster, the newest first.

    Raises:
        UserError: the cluster cannot be reached.
    """
    with cluster_errors(client.get_address()):
        jobs = [job for job in client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def _free_id(name: str, jobs: Sequence[JobDetails]) -> str:
    """The name, or name-2, name-3 and so on: Ray accepts each id once."""
    used = {job.submission_id for job in jobs}
    ids = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(job_id for job_id in ids if job_id not in used)


def follow_job(client: JobSubmissionClient, job_id: str, write: Callable[[str], object]) -> JobDetails:
    """Pass the job's log to `write` until the job has ended; returns its last state.

    Raises:
        UserError: the cluster cannot be reached for a minute.
    """
    log, reached_s, job = _Log(write), time.monotonic(), None
    while True:
        try:
            job = client.get_job_info(job_id)
            asyncio.run(log.tail(client, job_id))
            job = client.get_job_info(job_id)
            reached_s = time.monotonic()
        except BrokenPipeError:  # raised by `write`
            raise
        except (OSError, RuntimeError, aiohttp.ClientError):
            if time.monotonic() - reached_s > UNREACHABLE_S:
                folder = (job.metadata or {}).get(FOLDER_KEY) if job else None
                raise UserError(
                    f"the cluster at {client.get_address()} has not been reachable for {UNREACHABLE_S:.0f} s; the "
                    f"job's checkpoints and results stay in {folder or 'run.storage_path'}: the same command continues "
                    "from them on any cluster that can read them"
                ) from None
        else:
            if job.status.is_terminal():
                return job
        time.sleep(1)


class _Log:
    """A job's log. After a lost connection Ray sends it again from its start; `write` gets each character once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._num_written = write, 0  # characters

    async def tail(self, client: JobSubmissionClient, job_id: str) -> None:
        """Write the rest of the log as it grows, until the job or the connection ends."""
        received = 0
        async for text in client.tail_job_logs(job_id):
            new = text[max(0, self._num_written - received) :]
            received += len(text)
            if new:
                self._num_written = received
                self._write(new)


def job_log(client: JobSubmissionClient, job: JobDetails) -> str:
    """The log of a job so far.

    Raises:
        UserError: the cluster cannot be reached, or has no log of this job.
    """
    with cluster_errors(client.get_address()):
        return str(client.get_job_logs(job.submission_id))


def find_job(client: JobSubmissionClient, name: str) -> JobDetails:
    """The active or else the newest job of a run id or study, or the job of exactly this id.

    Raises:
        UserError: there is none.
    """
    jobs = list_jobs(client)
    named = [job for job in jobs if (job.metadata or {}).get(NAME_KEY) == name]
    found = [job for job in named if not job.status.is_terminal()] + named
    found += [job for job in jobs if job.submission_id == name]
    if not found:
        newest = ", ".join(str(job.submission_id) for job in jobs[:5]) or "none"
        raise UserError(f"no job '{name}' on {client.get_address()}; the newest jobs there: {newest}")
    return found[0]


def stop_job(client: JobSubmissionClient, job: JobDetails) -> JobDetails:
    """End a job as Ctrl-C would, and wait for its end; returns its last state.

    Raises:
        UserError: the cluster cannot be reached.
    """
    with cluster_errors(client.get_address()):
        client.stop_job(job.submission_id)
        deadline_s = time.monotonic() + STOP_S + 15
        while not job.status.is_terminal() and time.monotonic() < deadline_s:
            time.sleep(0.2)
            job = client.get_job_info(job.submission_id)
    return job
