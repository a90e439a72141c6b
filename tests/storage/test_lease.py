import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wml_ray.errors import UserError
from wml_ray.storage import lease as lease_module
from wml_ray.storage.files import get_text, put_text
from wml_ray.storage.lease import LEASE_FILE, STALE_S, SUSPENDED_S, LeaseLost, exclusive_access
from wml_ray.storage.paths import to_path

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from wml_ray.storage.lease import exclusive_access
from wml_ray.storage.paths import to_path
with exclusive_access(to_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
local_and_remote = pytest.mark.parametrize("folder", ["local", "remote"], indirect=True)


def stored(folder):
    return json.loads(get_text(folder / LEASE_FILE))


def write_lease(folder, **owner):
    """A lease of a process on another host, or as `owner` says."""
    elsewhere = {"token": "another", "host": "another-host", "machine": "another-host", "pid": 7, "started": "1"}
    put_text(folder / LEASE_FILE, json.dumps({**elsewhere, "renewed_s": time.time(), **owner}))


@contextlib.contextmanager
def holder(folder, *prefix):
    """A process that holds the lease, started by the command `prefix`."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLD, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@local_and_remote
def test_a_second_process_is_refused_and_can_take_the_folder_when_the_first_is_killed(folder):
    with holder(folder) as process:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
            exclusive_access(folder).__enter__()
        process.kill()
        process.wait()
        with exclusive_access(folder) as lease:
            lease.check()
    assert not (folder / LEASE_FILE).exists()


@pytest.mark.parametrize(
    ("folder", "stale"), [("local", False), ("local", True), ("remote", False)], indirect=["folder"]
)
def test_of_processes_that_start_at_once_exactly_one_takes_the_folder(folder, stale, monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.0)
    if stale:
        write_lease(folder, renewed_s=0)
    start, held, end = threading.Barrier(8), [], threading.Event()
    refused = threading.Semaphore(0)

    def take():
        start.wait()
        try:
            with exclusive_access(folder):
                held.append(threading.get_ident())
                end.wait(30)
        except UserError:
            refused.release()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert all(refused.acquire(timeout=30) for _ in range(7))
    end.set()
    for thread in threads:
        thread.join(30)
    assert len(held) == 1


def test_the_lease_of_a_zombie_process_is_taken_over(tmp_path):
    with holder(tmp_path) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with exclusive_access(tmp_path) as lease:
            lease.check()


def test_a_process_without_a_heartbeat_for_ten_minutes_loses_its_lease_though_it_exists(tmp_path):
    with holder(tmp_path):
        owner = stored(tmp_path)
        write_lease(tmp_path, **{**owner, "renewed_s": time.time() - SUSPENDED_S / 2})
        with pytest.raises(UserError, match="in use"), exclusive_access(tmp_path):
            pass
        write_lease(tmp_path, **{**owner, "renewed_s": time.time() - SUSPENDED_S})
        with exclusive_access(tmp_path) as lease:
            lease.check()


def test_a_process_that_another_one_outran_is_refused_on_any_error_of_the_storage(tmp_path, monkeypatch):
    def outrun(source, target):
        write_lease(tmp_path)
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", outrun)
    with pytest.raises(UserError, match="in use by process 7 on another-host"), exclusive_access(tmp_path):
        pass
    assert stored(tmp_path)["token"] == "another"


@local_and_remote
def test_the_lease_of_another_host_is_respected_until_its_heartbeat_is_too_old(folder):
    write_lease(folder)
    with pytest.raises(UserError, match="in use by process 7 on another-host"), exclusive_access(folder):
        pass
    assert stored(folder)["token"] == "another"
    write_lease(folder, renewed_s=time.time() - STALE_S)
    with exclusive_access(folder) as lease:
        lease.check()
    assert not (folder / LEASE_FILE).exists()


def test_a_process_in_another_pid_namespace_of_this_host_is_respected(tmp_path):
    """As containers that share the network, and so the name, of their host."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--mount-proc", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine allows no PID namespaces")
    with holder(tmp_path, *unshare), pytest.raises(UserError, match="in use"), exclusive_access(tmp_path):
        pass


def test_a_process_on_another_machine_of_the_same_name_is_respected(tmp_path):
    """The first PID namespace has the same number on all machines: only the id of the boot differs."""
    with exclusive_access(tmp_path):
        mine = stored(tmp_path)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    write_lease(tmp_path, **{**mine, "machine": mine["machine"].replace(boot, "another-boot"), "pid": 2**22 + 1})
    with pytest.raises(UserError, match="in use"), exclusive_access(tmp_path):
        pass


def test_the_lease_of_an_earlier_process_with_the_id_of_another_one_is_taken_over(tmp_path):
    with exclusive_access(tmp_path):
        mine = stored(tmp_path)
    put_text(tmp_path / LEASE_FILE, json.dumps({**mine, "token": "another", "pid": os.getppid(), "started": "1"}))
    with exclusive_access(tmp_path) as lease:
        lease.check()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1, "unknown": 2}'])
def test_a_damaged_lease_is_taken_over(tmp_path, content):
    (tmp_path / LEASE_FILE).write_text(content)
    with exclusive_access(tmp_path) as lease:
        lease.check()


@local_and_remote
def test_a_lease_that_another_process_took_over_is_lost_also_for_the_workers(folder):
    with exclusive_access(folder) as lease:
        worker = pickle.loads(pickle.dumps(lease))
        worker.check()
        write_lease(folder)
        with pytest.raises(LeaseLost, match="taken over by process 7 on another-host"):
            worker.check()
    assert stored(folder)["token"] == "another"


def test_a_lease_whose_file_was_deleted_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.01)
    with exclusive_access(tmp_path) as lease:
        (tmp_path / LEASE_FILE).unlink()
        with pytest.raises(LeaseLost, match="was deleted"):
            lease.check()


@local_and_remote
def test_a_lease_is_renewed_and_readable_at_every_moment(folder, monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    with exclusive_access(folder):
        renewals = set()
        deadline_s = time.monotonic() + 10
        while len(renewals) < 10:
            renewals.add(stored(folder)["renewed_s"])
            assert time.monotonic() < deadline_s


def test_folders_made_for_a_lease_are_removed_if_they_stay_empty(tmp_path):
    with exclusive_access(tmp_path / "made" / "run"):
        assert (tmp_path / "made" / "run" / LEASE_FILE).exists()
    assert not any(tmp_path.iterdir())
    with exclusive_access(tmp_path / "made" / "run"):
        (tmp_path / "made" / "result").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["result"]


@pytest.mark.filterwarnings("ignore:the lease on")
def test_a_lease_that_could_not_be_removed_does_not_bind_its_own_process(bucket, object_store):
    folder = to_path(bucket)
    with exclusive_access(folder):
        object_store.refuse_writes()
    object_store.accept_writes()
    assert stored(folder)["pid"] == os.getpid()
    with exclusive_access(folder) as lease:
        lease.check()
