"""Following and finding jobs, against a scripted job server."""

from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from wml_ray.config.load import parse_config
from wml_ray.errors import UserError
from wml_ray.search.settings import CompareConfig
from wml_ray.submit import jobs
from wml_ray.submit.job import Job
from wml_ray.submit.jobs import FOLDER_KEY, NAME_KEY, find_job, follow_job, submit


def details(job_id, status, start_time=0, metadata=None):
    metadata = metadata or {NAME_KEY: "run", FOLDER_KEY: "/shared/run"}
    kind, entrypoint = JobType.SUBMISSION, "python -m wml_ray.cli.job job.json"
    return JobDetails(
        type=kind, submission_id=job_id, status=status, entrypoint=entrypoint, metadata=metadata, start_time=start_time
    )


class JobServer:
    """Sends one log a connection, from its start; None loses the connection. The job ends with the last log."""

    def __init__(self, *logs, known=()):
        self.logs, self.known = list(logs), known

    def get_address(self):
        return "http://head:8265"

    def list_jobs(self):
        return list(self.known)

    def submit_job(self, submission_id, metadata, **_):
        self.known = [*self.known, details(submission_id, JobStatus.RUNNING, metadata=metadata)]

    def get_job_info(self, job_id):
        return details(job_id, JobStatus.RUNNING if self.logs else JobStatus.SUCCEEDED)

    async def tail_job_logs(self, job_id):
        for text in self.logs.pop(0):
            if text is None:
                raise aiohttp.ClientConnectionError
            yield text


def test_each_line_of_a_log_is_written_once_although_the_connection_was_lost():
    written = []
    server = JobServer(["one\n", "two\nth", None], ["one\ntwo\n", "three\n"])
    assert follow_job(server, "run", written.append).status == JobStatus.SUCCEEDED
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_lost_cluster_is_reported_with_the_folder_that_has_the_results(monkeypatch):
    monkeypatch.setattr(jobs, "UNREACHABLE_S", 0)
    with pytest.raises(
        UserError, match=r"the cluster at http://head:8265 has not been reachable .* stay in /shared/run"
    ):
        follow_job(JobServer([None], []), "run", print)


def test_a_dry_run_and_a_training_of_the_same_run_are_two_jobs(tmp_path):
    training = Job("train", parse_config({"run": {"storage_path": f"local://{tmp_path}"}}))
    check = replace(training, dry_run=True)
    server = JobServer()
    submitted = [submit(server, job, "wml-ray", "image", False, []) for job in (training, check, training, check)]
    assert [submission.running is None for submission in submitted] == [True, True, False, False]
    assert [submission.job_id for submission in submitted[2:]] == [submission.job_id for submission in submitted[:2]]


def test_a_comparison_arrives_as_it_was_sent():
    settings = {"methods": ["wml", "dml"], "seeds": 5, "keys": ["wml.alpha=0.1"], "published": "row,peer0\nKD,1\n"}
    job = Job("compare", parse_config({"seed": 3}), comparison=CompareConfig(study="c", **settings), verbose=True)
    assert Job.from_json(job.to_json()) == job
    assert (job.name, job.folder) == ("c", str(Path("results/c")))


def test_an_error_of_the_users_backbone_is_not_the_clusters(workplace, monkeypatch):
    monkeypatch.syspath_prepend(workplace)
    (workplace / "broken_net.py").write_text("raise RuntimeError('a mistake in the module')")
    job = Job("train", parse_config({"model": {"backbone": "broken_net:stages"}}))
    with pytest.raises(
        UserError, match=r"'broken_net:stages' .*RuntimeError: a mistake in the module \(broken_net.py, line 1"
    ):
        submit(JobServer(), job, "wml-ray", None, False, [])


def test_a_name_means_its_active_job_and_else_its_newest():
    first, second = details("run", JobStatus.RUNNING, 1), details("run-2", JobStatus.FAILED, 2)
    assert find_job(JobServer(known=[first, second]), "run") == first
    ended = details("run", JobStatus.STOPPED, 1)
    assert find_job(JobServer(known=[ended, second]), "run") == second
    assert find_job(JobServer(known=[first, second]), "run-2") == second
    with pytest.raises(UserError, match="no job 'runn' on http://head:8265; the newest jobs there: run-2, run"):
        find_job(JobServer(known=[first, second]), "runn")
