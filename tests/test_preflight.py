"""What `--dry-run` finds, on a cluster of a head and a node that sees other files than the driver."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from family import tiny_config, write_study
from servers import free_port

from wml_ray.preflight import answer

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head():
    """`ray start --head` with a core; the address and the environment to join it with."""
    folder = tempfile.mkdtemp(prefix="wr-", dir="/tmp")  # paths of sockets must be short
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.path.dirname(__file__)}
    command = [RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", address.split(":")[1]]
    command += ["--num-cpus", "1", "--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield address, environment
    stop(process)
    shutil.rmtree(folder, ignore_errors=True)


def stop(process):
    process.terminate()
    process.wait(60)


def start_node(address, environment, hidden=()):
    """A node with two cores that has empty folders in place of the `hidden` ones."""
    mounts = "".join(f"mount -t tmpfs none {folder} && " for folder in hidden)
    command = f"{mounts} exec {RAY} start --block --address {address} --node-ip-address 127.0.0.1 --num-cpus 2"
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def dry_run(environment, *words):
    """Exit status, and what was found by its subject."""
    done = subprocess.run(
        [sys.executable, "-m", "wml_ray", *words, "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()[:-1]]
    return done.returncode, {subject: (verdict, text) for subject, verdict, text in lines}


def until_fit(environment, *words):
    """`dry_run` once the node has joined."""
    deadline_s = time.monotonic() + 90
    while True:
        status, found = dry_run(environment, *words)
        if found.get("resources", ("NO",))[0] == "ok":
            return status, found
        assert time.monotonic() < deadline_s, found


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process other mounts")
def test_a_node_that_sees_other_files_and_packages_is_found_before_the_run(workplace, head):
    address, environment = head
    environment = {**environment, "RAY_ADDRESS": address}
    images = workplace / "images"
    for split in ("train", "val"):
        (images / split / "cat").mkdir(parents=True)
    write_study(workplace, tiny_config())
    words = ["train", "c.yaml", "data.name=imagefolder", f"data.root={images}", "scale.cpus_per_worker=1"]
    words += ["scale.workers=3"]
    other = workplace / "other"
    (other / "mlflow-0.1.dist-info").mkdir(parents=True)
    (other / "mlflow-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 0.1\n")
    path = f"{other}:{environment['PYTHONPATH']}"
    (workplace / "results").mkdir()
    node = start_node(address, {**environment, "PYTHONPATH": path}, hidden=[workplace / "results", images])
    try:
        status, found = until_fit(environment, *words)
        study = dry_run(environment, "tune", "c.yaml", "--space", "alpha.py", "--trials", "2")
    finally:
        stop(node)
    assert status == 2
    assert {subject for subject, (verdict, _) in found.items() if verdict == "NO"} == {
        "versions",
        "storage",
        "MLflow",
        "data",
    }
    assert "has mlflow 0.1" in found["versions"][1]
    assert f"'{workplace / 'results'}' is not the folder the driver sees" in found["storage"][1]
    assert "is a file of this machine, but workers on other nodes log to it" in found["MLflow"][1]
    assert f"data.root = '{images}'" in found["data"][1]
    assert study[1]["MLflow"][0] == "ok"  # a study's driver alone logs
    assert sorted(os.listdir()) == ["alpha.py", "c.yaml", "images", "other", "results"]
    assert not os.listdir("results")


def test_a_dry_run_on_one_machine_leaves_nothing_behind(workplace):
    write_study(workplace, tiny_config())
    status, found = dry_run(os.environ, "train", "c.yaml", "run.storage_path=deep/results", "data.name=cifar10")
    assert status == 2
    assert [subject for subject, (verdict, _) in found.items() if verdict == "NO"] == ["data"]
    assert sorted(os.listdir()) == ["alpha.py", "c.yaml"]


def test_a_worker_that_cannot_reach_mlflow_says_so(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    said = answer(str(marker), f"http://127.0.0.1:{free_port()}", {"name": "digits"})
    assert "does not answer (Connection refused)" in said.tracking
    assert said.storage == said.data == ""
