"""Runs and studies as Ray jobs: submitted, followed, stopped and asked after from another machine."""

from __future__ import annotations

import asyncio
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from wml_ray.cli.output import FAILED, OK
from wml_ray.errors import UserError
from wml_ray.submit.client import cluster_errors, last_line
from wml_ray.submit.entry import SUBMITTED_FROM
from wml_ray.submit.package import Package, Work, pack

STOP_S = 30  # Ray kills a job that has not ended this long after it was asked to
SILENCE_S = 60.0  # how long a follower bears a cluster that does not answer
NEWEST = 20  # jobs in a list
NAME_KEY, FOLDER_KEY = "wml_ray.job", "wml_ray.folder"


def check_image(work: Work) -> None:
    """Raises:
    UserError: the work would miss its files in a container, or leave its results there.
    """
    outside = [str(path) for name, path in work.files.items() if name.startswith("submitted/")]
    if outside:
        raise UserError(f"--image: {outside[0]} is not in the image; move it into the repository, and build it anew")
    if "://" not in work.config.run.storage_path:
        raise UserError(
            f"--image: run.storage_path = {work.config.run.storage_path} would vanish with the container; give an "
            "address such as s3://BUCKET/FOLDER, or start the nodes themselves from the image (KubeRay does)"
        )


def runtime_env(work: Work, package: Package | None, image: str | None, packages: bool) -> dict[str, Any]:
    """What the job's processes start in. Ray logs `env_vars` on every node, so no secret is among them."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), SUBMITTED_FROM: f"{socket.gethostname()}:{Path.cwd()}"}
    if image:
        return {"image_uri": image, "env_vars": variables}
    settings: dict[str, Any] = {"working_dir": str(package.path) if package else None, "env_vars": variables}
    if work.environment:
        settings["worker_process_setup_hook"] = "wml_ray.submit.entry.take_environment"
    if packages:
        lock = "-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.lock"  # too long for the variable Ray puts it in
        settings["pip"] = {"packages": [lock], "pip_check": False}
    return settings


def submit(
    client: JobSubmissionClient,
    work: Work,
    image: str | None = None,
    packages: bool = False,
    exclude: Sequence[str] = (),
) -> str:
    """Submit the work, or find the job that is at it; returns the job's id.

    Raises:
        UserError: the package is too large, the image will not do, or the cluster refuses the job.
    """
    entrypoint = shlex.join(["python", f"jobs/{work.verb}.py", *work.words])
    if image:
        check_image(work)
    with tempfile.TemporaryDirectory() as folder, cluster_errors(client.get_address()):
        package = None
        while True:
            jobs = _jobs(client)
            if active := [job for job in jobs if _is_same(job, work) and not job.status.is_terminal()]:
                _say_attached(active[0], entrypoint)
                return str(active[0].submission_id)
            if not image and package is None:
                package = _packed(work, Path(folder) / "package.zip", exclude)
            job_id = _free_id(work.name, jobs)
            if _submitted(client, job_id, entrypoint, work, runtime_env(work, package, image, packages)):
                _say_submitted(client, job_id, work, package)
                return job_id


def _packed(work: Work, target: Path, exclude: Sequence[str]) -> Package:
    try:
        return pack(work, target, exclude)
    except OSError as error:
        raise UserError(
            f"the code cannot be packed ({error}); make it readable, or leave it out with --exclude"
        ) from None


def _submitted(client: Any, job_id: str, entrypoint: str, work: Work, environment: dict[str, Any]) -> bool:
    """False where somebody else was quicker: Ray gives an id once."""
    metadata = {NAME_KEY: work.name, FOLDER_KEY: work.folder}
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=environment, metadata=metadata)
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise
        return False
    return True


def _jobs(client: Any) -> list[JobDetails]:
    """Submitted jobs, the newest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)


def _is_same(job: JobDetails, work: Work) -> bool:
    return bool((job.metadata or {}).get(FOLDER_KEY) == work.folder)


def _free_id(name: str, jobs: Sequence[JobDetails]) -> str:
    taken = {job.submission_id for job in jobs}
    return next(job_id for job_id in _ids(name) if job_id not in taken)


def _ids(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in count(2))


def _say_attached(job: JobDetails, entrypoint: str) -> None:
    _print(f"job         {job.submission_id} is {job.status} already; nothing was submitted")
    if job.entrypoint != entrypoint:
        _print(f"its command {job.entrypoint}")


def _say_submitted(client: Any, job_id: str, work: Work, package: Package | None) -> None:
    _print(f"job         {job_id} on {client.get_address()}")
    if package:
        _print(f"package     {package.files} files, {package.size_bytes / 1e6:.1f} MB")
    if work.environment:
        what = "passed on  " if package else "NOT passed on, as Ray would log it: set it in the image or on the nodes:"
        _print(f"{what} {', '.join(sorted(work.environment))}")
    if work.verb == "train" and work.config.scale.workers == 0:
        _print("note        scale.workers = 0 trains on the head node, and reserves nothing there; see scale.workers=1")


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Show the job's log until it has ended; 0 if it succeeded, else 1.

    Raises:
        UserError: the cluster is gone.
    """
    log, answered_s, job = _Log(), time.monotonic(), None
    while True:
        try:
            job = client.get_job_info(job_id)
            asyncio.run(log.tail(client, job_id))
            job = client.get_job_info(job_id)
            answered_s = time.monotonic()
        except BrokenPipeError:  # nobody reads what we print
            raise
        except (OSError, RuntimeError, aiohttp.ClientError):
            if time.monotonic() - answered_s > SILENCE_S:
                raise UserError(_what_remains(client.get_address(), job)) from None
        else:
            if job.status.is_terminal():
                return _say_ended(job)
        time.sleep(1)


def _what_remains(address: str, job: JobDetails | None) -> str:
    folder = (job.metadata or {}).get(FOLDER_KEY) if job else None
    return (
        f"the cluster at {address} has not answered for {SILENCE_S:.0f} s; the job's checkpoints and results stay in "
        f"{folder or 'run.storage_path'}: submitted to a cluster that sees them, the same command goes on from there"
    )


class _Log:
    """A job's log, which comes from its beginning again when the connection was lost."""

    def __init__(self) -> None:
        self.printed = 0  # characters

    async def tail(self, client: Any, job_id: str) -> None:
        """Print what was not yet."""
        seen = 0
        async for text in client.tail_job_logs(job_id):
            fresh = text[max(0, self.printed - seen) :]
            seen += len(text)
            if fresh:
                self.printed = seen
                print(fresh, end="", flush=True)


def _say_ended(job: JobDetails) -> int:
    _print(f"job         {job.submission_id} {job.status}")
    if job.driver_exit_code == 127:
        _print("            the head node has no `python`: activate the environment there before `ray start --head`")
    elif job.status == JobStatus.FAILED and job.driver_exit_code is None:
        _print(f"            {last_line(job.message or '')}")
    return OK if job.status == JobStatus.SUCCEEDED else FAILED


def find(client: JobSubmissionClient, name: str) -> JobDetails:
    """The newest job of a run id or study, or the job of exactly this id.

    Raises:
        UserError: there is none.
    """
    with cluster_errors(client.get_address()):
        jobs = _jobs(client)
    named = [job for job in jobs if (job.metadata or {}).get(NAME_KEY) == name]
    found = [job for job in named if not job.status.is_terminal()] + named
    found += [job for job in jobs if job.submission_id == name]
    if not found:
        known = ", ".join(str(job.submission_id) for job in jobs[:5]) or "none"
        raise UserError(f"no job '{name}' on {client.get_address()}; the newest jobs there: {known}")
    return found[0]


def stop(client: JobSubmissionClient, name: str) -> int:
    """Ask a job to end as Ctrl-C would, and wait until it has."""
    job = find(client, name)
    if job.status.is_terminal():
        _print(f"job         {job.submission_id} had ended before: {job.status}")
        return OK
    with cluster_errors(client.get_address()):
        client.stop_job(job.submission_id)
        deadline_s = time.monotonic() + STOP_S + 15
        while not job.status.is_terminal() and time.monotonic() < deadline_s:
            time.sleep(0.2)
            job = client.get_job_info(job.submission_id)
    _print(f"job         {job.submission_id} {job.status}")
    return OK if job.status.is_terminal() else FAILED


def status(client: JobSubmissionClient, name: str) -> int:
    """Say how a job is doing."""
    job = find(client, name)
    _print(f"job         {job.submission_id} {job.status}")
    _print(f"started     {_started(job)}, {_seconds(job):.0f} s")
    _print(f"command     {job.entrypoint}")
    if job.status == JobStatus.PENDING and job.message:
        _print(f"            {last_line(job.message)}")
    return OK


def list_jobs(client: JobSubmissionClient) -> int:
    """The newest jobs of the cluster, a line each."""
    with cluster_errors(client.get_address()):
        jobs = _jobs(client)[:NEWEST]
    width = max((len(str(job.submission_id)) for job in jobs), default=0)
    for job in jobs:
        _print(f"{job.submission_id:<{width}}  {job.status:<9}  {_started(job)}  {_seconds(job):>7.0f} s")
    if not jobs:
        _print(f"no jobs on {client.get_address()}")
    return OK


def _started(job: JobDetails) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or time.time() * 1000) / 1000))


def _seconds(job: JobDetails) -> float:
    now_ms = time.time() * 1000
    return ((job.end_time or now_ms) - (job.start_time or now_ms)) / 1000


def how_to_go_on(job_id: str, address: str | None) -> list[str]:
    """Lines for somebody who does not follow the job (any more)."""
    behind = f" --address {address}" if address else ""
    return [
        "follow      the same command again, without --detach",
        f"status      python jobs/submit.py status {job_id}{behind}",
        f"stop        python jobs/submit.py stop {job_id}{behind}",
    ]


def _print(line: str) -> None:
    print(line, flush=True)
