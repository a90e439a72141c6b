"""A real Ray head with token authentication, and jobs sent to it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from deadline import DEADLINE_S
from servers import free_port

ROOT = Path(__file__).parent.parent
WATCH = """
import ray, time
ray.init(log_to_driver=False, logging_level="ERROR")
while True:
    print(ray.available_resources().get("CPU", 0), flush=True)
    time.sleep(0.2)
"""


class Head:
    """`ray start --head` with a token, a home and ports of its own."""

    def __init__(self, folder):
        self.folder, self.home = folder, folder / "home"
        (self.home / ".ray").mkdir(parents=True)
        (self.home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
        self.temp = Path(tempfile.mkdtemp(prefix="wr-", dir="/tmp"))  # paths of sockets must be short
        self.port, dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        command = ["start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats", "--temp-dir", self.temp]
        command += ["--node-ip-address", "127.0.0.1", "--port", self.port, "--dashboard-port", dashboard]
        for option in ("ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc"):
            command += [f"--{option}-port", free_port()]
        self.metrics_port = free_port()
        command += ["--metrics-export-port", self.metrics_port]
        with (folder / "head.log").open("w") as log:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), *map(str, command)],
                env=self.environment(
                    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
                    RAY_TRAIN_ENABLE_STATE_TRACKING="1",
                    PYTHONPATH=str(ROOT),  # for drivers that are no jobs
                ),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def environment(self, **more):
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
        path = f"{Path(sys.executable).parent}:{mine['PATH']}"
        return {**mine, "HOME": str(self.home), "PATH": path, "OMP_NUM_THREADS": "1", **more}

    def wait(self):
        deadline_s, refusal = time.monotonic() + DEADLINE_S, ""
        while "no job 'nobody'" not in refusal:
            assert self.process.poll() is None, (self.folder / "head.log").read_text()
            assert time.monotonic() < deadline_s, refusal
            refusal = self.run("jobs", "status", "nobody").stderr

    def start(self, *words, folder=None, **variables):
        """`wml-ray` in a process of its own, with --address unless RAY_ADDRESS is given."""
        address = [] if "RAY_ADDRESS" in variables else ["--address", self.url]
        return subprocess.Popen(
            [sys.executable, "-m", "wml_ray", *words, *address],
            cwd=folder or self.folder,
            env=self.environment(
                **{"RAY_ADDRESS": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)} | variables
            ),  # --address wins
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
        )

    def run(self, *words, folder=None, **variables):
        process = self.start(*words, folder=folder, **variables)
        out, errors = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    @contextmanager
    def watched_cores(self):
        """A function that waits until so many cores are free, in a process that has joined the cluster."""
        environment = self.environment(RAY_ADDRESS=f"127.0.0.1:{self.port}", RAY_AUTH_MODE="token")
        command = [sys.executable, "-c", WATCH]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as watcher:

            def wait_for(cores):
                while float(watcher.stdout.readline()) < cores:
                    pass

            try:
                watcher.stdout.readline()
                yield wait_for
            finally:
                watcher.kill()

    def metrics(self):
        """The metrics that Prometheus would read."""
        return urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10).read().decode()

    def state(self):
        """What Ray's state API and the page of Ray Train show in full, by the path of the request."""
        token = (self.home / ".ray" / "auth_token").read_text()
        kinds = ("jobs", "actors", "tasks", "workers", "objects", "placement_groups", "runtime_envs")
        found = {}
        for path in ("api/jobs/", "api/train/v2/runs/v1", *(f"api/v0/{kind}" for kind in kinds)):
            address = f"{self.url}/{path}?detail=true&limit=1000"
            request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
            found[path] = urllib.request.urlopen(request, timeout=30).read().decode()
        return found

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        shutil.rmtree(self.temp, ignore_errors=True)
