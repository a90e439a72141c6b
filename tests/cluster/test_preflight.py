"""What `--dry-run` finds, on one machine, and on a cluster with a node that sees other files than the driver."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from family import tiny_config, write_study
from nodes import ENVIRONMENT, nodes
from servers import free_port

from wml_ray.cluster.preflight import report_node

TESTS = Path(__file__).parents[1]


def dry_run(environment, *words):
    """Exit status, and what was found by its subject."""
    command = [sys.executable, "-m", "wml_ray", *words, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()[:-1]]
    return done.returncode, {subject: (verdict, text) for subject, verdict, text in lines}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process other mounts")
def test_a_node_that_sees_other_files_and_packages_is_found_before_the_run(empty_workplace):
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
    wrong = {subject: text for subject, (verdict, text) in run.items() if verdict == "NO"}
    assert set(wrong) == {"versions", "storage", "MLflow", "data"}
    assert "node other has mlflow 0.1" in wrong["versions"]
    assert f"'{results}' is not the folder the driver sees" in wrong["storage"]
    assert "is a file of this machine, but workers on others log to it" in wrong["MLflow"]
    assert f"data.root = '{images}'" in wrong["data"]
    assert study["MLflow"][0] == "ok"  # a study's driver alone logs
    assert sorted(os.listdir()) == ["alpha.py", "c.yaml", "images", "packages", "results"]
    assert not os.listdir("results")


def test_a_dry_run_on_one_machine_leaves_nothing_behind(empty_workplace):
    write_study(empty_workplace, tiny_config())
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    status, found = dry_run(environment, "train", "c.yaml", "run.storage_path=deep/results", "data.name=cifar10")
    assert status == 2
    assert [subject for subject, (verdict, _) in found.items() if verdict == "NO"] == ["data"]
    assert sorted(os.listdir()) == ["alpha.py", "c.yaml"]


def test_a_worker_that_cannot_reach_mlflow_says_so(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    said = report_node(str(marker), f"http://127.0.0.1:{free_port()}", {"name": "digits"}, {})
    assert "does not answer (Connection refused)" in said.tracking
    assert said.storage == said.data == ""
