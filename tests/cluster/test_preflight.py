"""Checks before a run, on one machine, and on a cluster with a node that has other files and packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from deadline import DEADLINE_S
from family import taught_by, tiny_config, write_study
from nodes import ENVIRONMENT, nodes
from servers import free_port

from wml_ray.cluster.connect import join_cluster, with_absolute_paths
from wml_ray.cluster.nodes import report_node
from wml_ray.cluster.preflight import run_checks
from wml_ray.config.load import parse_config
from wml_ray.errors import UserError

TESTS = Path(__file__).parents[1]


def dry_run(environment, *words):
    """Exit status, and the verdict and text of each check by its subject."""
    command = [sys.executable, "-m", "wml_ray", *words, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()[:-1]]
    return done.returncode, {subject: (verdict, text) for subject, verdict, text in lines}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process other mounts")
def test_a_node_with_other_files_and_packages_fails_the_checks(empty_workplace):
    images, results, packages = (empty_workplace / name for name in ("images", "results", "packages"))
    for folder in (images / "train" / "cat", images / "val" / "cat", results, packages / "mlflow-0.1.dist-info"):
        folder.mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: mlflow\nVersion: 0.1\n"
    (packages / "mlflow-0.1.dist-info" / "METADATA").write_text(metadata)
    write_study(empty_workplace, tiny_config("scale.cpus_per_worker=1", "scale.workers=3"))
    with nodes(head_cpus=1) as cluster:
        cluster.add(cpus=2, hidden=[results, images], PYTHONPATH=f"{packages}:{ENVIRONMENT['PYTHONPATH']}")
        environment = cluster.environment()
        status, run = dry_run(environment, "train", "c.yaml", "data.name=imagefolder", f"data.root={images}")
        _, study = dry_run(environment, "tune", "c.yaml", "--space", "alpha.py", "--trials", "2")
    assert status == 2
    failed = {subject: text for subject, (verdict, text) in run.items() if verdict == "NO"}
    assert set(failed) == {"versions", "storage", "MLflow", "data"}
    assert "node other has mlflow 0.1" in failed["versions"]
    assert f"'{results}' is not the driver's folder" in failed["storage"]
    assert "is a file of this machine, but workers on others log to it" in failed["MLflow"]
    assert f"data.root = '{images}'" in failed["data"]
    assert study["MLflow"][0] == "ok"  # only the driver of a study logs
    assert sorted(os.listdir()) == ["alpha.py", "c.yaml", "images", "packages", "results"]
    assert not os.listdir("results")


def test_checks_of_one_machine_leave_no_file(empty_workplace):
    config = tiny_config("run.storage_path=deep/results", "data.name=cifar10")
    results = {result.subject: result for result in run_checks(config)}
    assert [subject for subject, result in results.items() if not result.passed] == ["data"]
    assert not os.listdir()


def test_a_missing_image_folder_is_one_failed_check(empty_workplace):
    failed = [result.subject for result in run_checks(tiny_config("data.name=imagefolder")) if not result.passed]
    assert failed == ["data"]


def test_a_token_that_the_cluster_refuses_is_one_line(monkeypatch):
    def init(*_, **__):
        raise ray.exceptions.AuthenticationError("the token\nis wrong")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(UserError, match=r"cluster at head:6379 \(the token is wrong.*copy ~/\.ray/auth_token here$"):
        join_cluster()
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="cluster on this machine"):
        join_cluster()


def test_a_dry_run_in_this_process_imports_neither_torch_nor_ray(empty_workplace):
    (empty_workplace / "c.yaml").write_text("data: {name: digits}")
    program = (
        "import sys; from wml_ray.cli.main import main\n"
        "assert main(['train', 'c.yaml', '--dry-run']) == 0\n"
        "assert not {'torch', 'ray', 'mlflow', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert os.listdir() == ["c.yaml"]


def test_a_node_without_the_teacher_reports_it(tmp_path, teacher_run):
    marker = tmp_path / "marker"
    marker.touch()
    for run, errors in ((str(teacher_run), set()), (str(tmp_path), {"teacher"})):
        report = report_node(str(marker), "", {"method": {"name": "kd"}, "teacher": {"run": run}}, {})
        assert report.errors.keys() == errors


def test_workers_receive_the_folder_of_a_teacher_that_is_named_by_its_id(teacher_run):
    overrides = taught_by(teacher_run.name, "kd")
    config = tiny_config(*overrides, f"run.storage_path={os.path.relpath(teacher_run.parents[1])}")
    settings = with_absolute_paths(config)
    assert settings["teacher"]["run"] == str(teacher_run)
    assert parse_config(settings).run_id == config.run_id
    unused = with_absolute_paths(tiny_config("teacher.run=nowhere"))
    assert unused["teacher"]["run"] == "nowhere"


def test_a_worker_that_cannot_reach_mlflow_reports_it(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    report = report_node(str(marker), f"http://127.0.0.1:{free_port()}", {}, {})
    assert report.errors.keys() == {"MLflow"}
    assert "does not answer (Connection refused)" in report.errors["MLflow"]
