"""A Ray cluster of several nodes on one machine, to which nodes are added and in which they are killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from deadline import DEADLINE_S
from ray._raylet import GcsClient
from servers import free_port

RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_period_ms": "500",  # Ray declares a killed node dead after 5 of them
    "RAY_health_check_initial_delay_ms": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")])),
}


@contextmanager
def nodes(head_cpus: int = 0) -> Iterator[Nodes]:
    """A cluster of a head alone, by default without a CPU."""
    cluster = Nodes()
    try:
        cluster.start_head(head_cpus)
        yield cluster
    finally:
        cluster.end()


class Nodes:
    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wn-", dir="/tmp"))  # paths of sockets must be short
        self.address = f"127.0.0.1:{free_port()}"
        self.workers: list[psutil.Process] = []
        self.ids: list[str] = []  # of the workers
        self.head: psutil.Process | None = None

    def start_head(self, cpus: int = 0) -> None:
        options = ["--port", self.address.rpartition(":")[2], "--dashboard-port", free_port(), "--num-cpus", cpus]
        self.head = self._start("--head", "--temp-dir", self.folder, "--include-dashboard", "false", *options)
        self._wait(1)

    def add(self, cpus: int = 1, hidden: Sequence[Path] = (), **variables: str) -> None:
        """Start one more node and wait for it: two that start at once would take the same socket.

        With `hidden` folders, which are empty on the node, its host name is "other".
        """
        joined = self._joined()
        options = ["--address", self.address, "--num-cpus", cpus]
        self.workers.append(self._start(*options, hidden=hidden, **variables))
        self._wait(len(joined) + 1)
        (new,) = self._joined() - joined
        self.ids.append(new)

    def announce_preemption(self, index: int, seconds: int) -> None:
        """Announce the preemption of a node, as the agent of a cloud does for spot machines."""
        options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine reclaimed"]
        options += [
            "--deadline-remaining-seconds",
            str(seconds),
            "--node-id",
            self.ids[index],
            "--address",
            self.address,
        ]
        subprocess.run([RAY, "drain-node", *options], env=self.environment(), capture_output=True, check=True)

    def _wait(self, count: int) -> None:
        """Wait until so many nodes have joined, with the head."""
        deadline_s = time.monotonic() + DEADLINE_S
        while len(self._joined()) < count:
            assert time.monotonic() < deadline_s, self._log()
            time.sleep(0.1)

    def have(self, count: int) -> None:
        """Add or kill nodes until there are so many."""
        while len(self.workers) > count:
            self.kill(0)
        while len(self.workers) < count:
            self.add()

    def kill(self, index: int) -> None:
        """Kill all processes of a node at once, as a power cut does; returns when the head has noticed."""
        joined = self._joined()
        kill_family(self.workers.pop(index))
        del self.ids[index]
        while self._joined() >= joined:  # a superset, or the same
            time.sleep(0.1)

    def hosts(self, name: str) -> list[int]:
        """Indices of the nodes that run a process of this name."""
        return [index for index, node in enumerate(self.workers) if any(name in line for line in _commands(node))]

    def environment(self, **more: str) -> dict[str, str]:
        """Environment variables for a driver."""
        return {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": self.address, **more}

    def end(self) -> None:
        for process in [*self.workers, *([self.head] if self.head else [])]:
            kill_family(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *options: object, hidden: Sequence[Path] = (), **variables: str) -> psutil.Process:
        command = [str(RAY), "start", "--block", "--disable-usage-stats", "--min-worker-port", "0"]
        command += [
            "--object-store-memory",
            str(100 * 2**20),
            "--max-worker-port",
            "0",
            "--dashboard-agent-listen-port",
            str(free_port()),
        ]
        command += map(str, options)
        if hidden:
            mounts = "".join(f"mount -t tmpfs none {folder} && " for folder in hidden)
            command = ["unshare", "-m", "-u", "sh", "-c", f'{mounts} hostname other && exec "$@"', "sh", *command]
        environment = {**os.environ, **ENVIRONMENT, **variables}
        with (self.folder / "nodes.log").open("a") as log:
            return psutil.Popen(command, env=environment, stdout=log, stderr=log)

    def _joined(self) -> set[str]:
        """Ids of the nodes that are alive according to the head."""
        assert self.head is not None
        assert self.head.is_running(), self._log()
        try:
            found = GcsClient(address=self.address).get_all_node_info(timeout=2)
        except Exception:  # of any type, while the head starts
            return set()
        return {node_id.hex() for node_id, node in found.items() if node.state == 0}

    def _log(self) -> str:
        return (self.folder / "nodes.log").read_text()


def _commands(process: psutil.Process) -> Iterator[str]:
    """Command lines of all descendants."""
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            yield " ".join(child.cmdline())


def kill_family(process: psutil.Process) -> None:
    """Kill a process and all its descendants; the parent first, so that it starts no others."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    kill_all(family)


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """Kill processes, all before the first wait for one to end."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def named(process: psutil.Process, name: str) -> list[psutil.Process]:
    """The descendants of a process whose command line has this name."""
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found += [child] if name in " ".join(child.cmdline()) else []
    return found
