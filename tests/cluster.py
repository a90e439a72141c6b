"""A Ray cluster of real processes on this machine: a head, and nodes that come and go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from servers import free_port

RAY = str(Path(sys.executable).with_name("ray"))
NODES = """
import json, ray
ray.init(log_to_driver=False, logging_level="ERROR")
nodes = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" not in node["Resources"]]
print(json.dumps([node["NodeID"] for node in nodes]))
"""


class Cluster:
    """`ray start --head`, without a dashboard and on ports of its own; `environment` joins it."""

    def __init__(self, head_cpus):
        self.folder = tempfile.mkdtemp(prefix="wr-", dir="/tmp")  # paths of sockets must be short
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": path_of_tests()}
        self.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
        options = ["--head", "--port", self.address.split(":")[1], "--num-cpus", str(head_cpus)]
        options += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", self.folder]
        self.processes = [self._start(options, self.environment)]
        self.environment["RAY_ADDRESS"] = self.address

    def add_node(self, cpus, hidden=(), **variables):
        """A node; with `hidden` folders, which are empty to it, it is a machine of its own, named other."""
        environment = {**self.environment, **variables}
        del environment["RAY_ADDRESS"]
        self.processes.append(self._start(["--address", self.address, "--num-cpus", str(cpus)], environment, hidden))

    def nodes(self):
        """Ids of the nodes besides the head."""
        command = [sys.executable, "-c", NODES]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def wait_for_nodes(self, count, timeout_s=90):
        deadline_s = time.monotonic() + timeout_s
        while len(found := self.nodes()) < count:
            assert time.monotonic() < deadline_s, found
        return found

    def announce_preemption(self, node_id, seconds):
        """What a cloud's agent does when it hears that a spot machine is to go."""
        options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot machine reclaimed"]
        options += ["--deadline-remaining-seconds", str(seconds), "--node-id", node_id, "--address", self.address]
        done = subprocess.run([RAY, "drain-node", *options], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def kill_node(self, index):
        """All processes of the node that was added as number `index`, at once, as when its machine is switched off."""
        started = psutil.Process(self.processes[1 + index].pid)
        for process in [*started.children(recursive=True), started]:
            process.kill()

    def stop(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _start(options, environment, hidden=()):
        command = [RAY, "start", "--block", "--node-ip-address", "127.0.0.1", *options]
        if hidden:
            mounts = "".join(f"mount -t tmpfs none {folder} && " for folder in hidden)
            command = ["unshare", "-m", "-u", "sh", "-c", f'{mounts} hostname other && exec "$@"', "sh", *command]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def path_of_tests():
    here = os.path.dirname(__file__)
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
