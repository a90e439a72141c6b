"""The verbs `submit` and `jobs`: they send work to a Ray cluster and print the state of the jobs there."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from typing import TYPE_CHECKING

from wml_ray.cli.exit_codes import FAILED, OK
from wml_ray.cli.job import job_from_options
from wml_ray.cli.output import print_line
from wml_ray.submit.token import configure_ray

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from wml_ray.submit.job import Job
    from wml_ray.submit.jobs import Submission

NUM_LISTED = 20  # newest jobs in a list


def submit_job(options: argparse.Namespace) -> int:
    """Submit a run or study, or find the job that works on it, and follow the log unless --detach is given."""
    configure_ray()
    from wml_ray.submit.client import connect
    from wml_ray.submit.jobs import submit

    job = job_from_options(options)
    client = connect(options.address)
    submission = submit(client, job, shown_command(options), options.image, options.packages, options.include)
    _print_submission(client, job, submission)
    code = OK
    if not options.detach:
        try:
            return _follow(client, submission.job_id)
        except KeyboardInterrupt:
            print(f"\nno longer following; job {submission.job_id} continues", file=sys.stderr)
            code = FAILED
    address = f" --address {options.address}" if options.address else ""
    print_line("follow      the same command again, without --detach")
    for action in ("status", "logs", "stop"):
        print_line(f"{action:<11} wml-ray jobs {action} {submission.job_id}{address}")
    return code


def manage_jobs(options: argparse.Namespace) -> int:
    """Run `wml-ray jobs status`, `stop` or `logs`; returns the exit code."""
    configure_ray()
    from wml_ray.submit.client import connect
    from wml_ray.submit.jobs import find_job, job_log, stop_job

    client = connect(options.address)
    if options.action == "status" and options.name is None:
        return _list_jobs(client)
    job = find_job(client, options.name)
    if options.action == "status":
        return _print_status(job)
    if options.action == "logs":
        if options.follow:
            return _follow(client, str(job.submission_id))
        print(job_log(client, job), end="", flush=True)
        return OK
    if job.status.is_terminal():
        print_line(f"job         {job.submission_id} has ended before: {job.status}")
        return OK
    job = stop_job(client, job)
    print_line(f"job         {job.submission_id} {job.status}")
    return OK if job.status.is_terminal() else FAILED


def shown_command(options: argparse.Namespace) -> str:
    """The command line for `wml-ray jobs status`."""
    return shlex.join(["wml-ray", *options.words])


def _print_submission(client: JobSubmissionClient, job: Job, submission: Submission) -> None:
    if running := submission.running:
        print_line(f"job         {running.submission_id} is {running.status} already; nothing was submitted")
        print_line(f"command     {_command(running)}")
        return
    print_line(f"job         {submission.job_id} on {client.get_address()}")
    if package := submission.package:
        print_line(f"package     {package.num_files} files, {package.size_bytes / 1e6:.1f} MB")
    if names := ", ".join(sorted(submission.environment)):
        reason = "NOT passed on, because Ray would log it; set it in the image or on the nodes:"
        print_line(f"passed on   {names}" if submission.package else f"{reason} {names}")
    if job.verb == "train" and job.config.scale.workers == 0:
        print_line(
            "note        scale.workers = 0 trains on the head node and reserves no CPU there; see scale.workers=1"
        )


def _follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print the log until the job has ended, then its state; returns 0 if it succeeded, else 1."""
    from wml_ray.submit.client import last_line
    from wml_ray.submit.jobs import follow_job

    job = follow_job(client, job_id, lambda text: print(text, end="", flush=True))
    print_line(f"job         {job.submission_id} {job.status}")
    if job.driver_exit_code == 127:
        print_line(
            "            the head node has no `python`: activate the environment there before `ray start --head`"
        )
    elif job.status == "FAILED" and job.driver_exit_code is None:
        print_line(f"            {last_line(job.message or '')}")
    return OK if job.status == "SUCCEEDED" else FAILED


def _print_status(job: JobDetails) -> int:
    from wml_ray.submit.client import last_line

    print_line(f"job         {job.submission_id} {job.status}")
    print_line(f"started     {_start_time(job)}, {_duration_s(job):.0f} s")
    print_line(f"command     {_command(job)}")
    if job.status == "PENDING" and job.message:
        print_line(f"            {last_line(job.message)}")
    return OK


def _list_jobs(client: JobSubmissionClient) -> int:
    from wml_ray.submit.jobs import list_jobs

    jobs = list_jobs(client)[:NUM_LISTED]
    width = max((len(str(job.submission_id)) for job in jobs), default=0)
    for job in jobs:
        print_line(f"{job.submission_id:<{width}}  {job.status:<9}  {_start_time(job)}  {_duration_s(job):>7.0f} s")
    if not jobs:
        print_line(f"no jobs on {client.get_address()}")
    return OK


def _command(job: JobDetails) -> str:
    from wml_ray.submit.jobs import COMMAND_KEY

    return str((job.metadata or {}).get(COMMAND_KEY, job.entrypoint))


def _start_time(job: JobDetails) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or time.time() * 1000) / 1000))


def _duration_s(job: JobDetails) -> float:
    now_ms = time.time() * 1000
    return ((job.end_time or now_ms) - (job.start_time or now_ms)) / 1000
