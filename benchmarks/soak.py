"""Kill the trials, the driver and the MLflow server of a study at random, and check that nothing is lost.

python benchmarks/soak.py --minutes 10 --seed 0

The seed determines the kills and the pauses between them. The last start is not killed. Exit status 1 if a trial or an
epoch is lost or logged twice.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from wml_ray.errors import UserError
from wml_ray.search.trials import TrialStore
from wml_ray.tracking.client import check_reachable, client_of
from wml_ray.tracking.tags import TRIAL_TAG

ROOT = Path(__file__).parent.parent
STUDY, EPOCHS, TRIALS = "soak", 8, 4  # trials of the first start, and trials added each time that all are done
TARGETS = ("trial", "trial", "driver", "server")  # killed in random order, then again
PAUSE_S = (3.0, 10.0)  # between two kills
DOWN_S = (1.0, 6.0)  # between the kill of the server and its restart
ERRORS = ("trials lost", "epochs missing", "epochs duplicated", "exit status of the last start")
METRICS = ("train/loss", "val/accuracy/peer0", "weights/peer0")


class Server:
    """An MLflow server over an sqlite file."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.restart_s = 0.0  # time of its next start
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }  # which would start a dozen processes
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def is_listening(self) -> bool:
        """Whether its port accepts connections."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def wait(self) -> None:
        """Start the server if it is down, and wait until it responds."""
        if self.process is None:
            self.start()
        while True:
            try:
                return check_reachable(self.uri)
            except UserError:
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Driver:
    """`wml-ray tune`, always the same command, with more trials when all are done."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder, self.uri, self.trials = folder, uri, TRIALS
        self.process: Any = None

    def start(self) -> None:
        space = ROOT / "tune_spaces" / "smoke.py"
        command = [sys.executable, "-m", "wml_ray", "tune", ROOT / "jobs" / "search.yaml", "--space", space]
        command += ["--study", STUDY, "--trials", self.trials, "--scheduler", "none", f"optim.epochs={EPOCHS}"]
        command += ["data.batch_size=256", "pruning.saliency_images=32", "scale.max_failures=1000"]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": self.uri, "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        with (self.folder / "driver.log").open("a") as log:
            self.process = psutil.Popen(
                [str(word) for word in command], cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def trial_processes(self) -> list[psutil.Process]:
        """Processes of the actors that train now."""
        try:
            return [child for child in self.process.children(recursive=True) if _is_trial(child)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill the driver alone; Ray's processes end by themselves."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _is_trial(process: psutil.Process) -> bool:
    try:
        return "trial-" in process.cwd() and process.name().startswith("ray::")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def soak(minutes: float, seed: int, folder: Path) -> dict[str, int]:
    """Kill for so many minutes, then let the study finish; returns the counts of `_count` and of the kills."""
    draw, targets = random.Random(seed), list[str]()
    done = Counter({f"{target}s killed": 0 for target in dict.fromkeys(TARGETS)})
    server = Server(folder)
    driver = Driver(folder, server.uri)
    try:
        server.wait()
        driver.start()
        end_s = time.monotonic() + 60 * minutes
        kill_s = time.monotonic() + draw.uniform(*PAUSE_S)
        while time.monotonic() < end_s:
            _restart(driver, server, done)
            if time.monotonic() > kill_s:
                targets = targets or draw.sample(TARGETS, len(TARGETS))
                if _kill(targets[-1], driver, server, draw):
                    done[f"{targets.pop()}s killed"] += 1
                    kill_s = time.monotonic() + draw.uniform(*PAUSE_S)
            time.sleep(0.1)
        server.wait()
        driver.process.wait()
        driver.start()  # without kills; trials that are still missing afterwards are lost
        done["exit status of the last start"] = driver.process.wait()
        return {**done, **_count(driver)}
    finally:
        driver.kill()
        server.kill()


def _restart(driver: Driver, server: Server, done: Counter[str]) -> None:
    """Restart the server after its pause, and the driver at once and with the same command."""
    if server.process is None and time.monotonic() > server.restart_s:
        server.start()
    status = driver.process.poll()
    if status is not None:
        done["starts of the driver that ended by themselves"] += status > 0  # because the server was down
        driver.trials += TRIALS if status == 0 else 0
        driver.start()


def _kill(target: str, driver: Driver, server: Server, draw: random.Random) -> bool:
    """Kill a process and return True; False if it is not running, or is a driver without running trials."""
    trials = driver.trial_processes()
    if target == "server":
        if server.process is None or not server.is_listening():
            return False
        server.kill()
        server.restart_s = time.monotonic() + draw.uniform(*DOWN_S)
    elif not trials:
        return False
    elif target == "driver":
        driver.kill()
    else:
        try:
            draw.choice(trials).kill()
        except psutil.NoSuchProcess:  # it ended in the meantime
            return False
    return True


def _count(driver: Driver) -> dict[str, int]:
    """Trials and epochs of the study, and those that its folder and MLflow contain."""
    os.environ["MLFLOW_TRACKING_URI"] = driver.uri
    client = client_of(driver.uri)
    experiment = client.get_experiment_by_name(STUDY).experiment_id
    complete = {trial.number for trial in TrialStore(driver.folder / "results" / STUDY).trials() if trial.final}
    logged = Counter[tuple[int, str, int]]()
    finished = set()
    for run in client.search_runs([experiment], f"tags.`{TRIAL_TAG}` != ''"):
        number = int(run.data.tags[TRIAL_TAG])
        if run.info.status == "FINISHED":
            finished.add(number)
        for metric in METRICS:
            logged.update((number, metric, entry.step) for entry in client.get_metric_history(run.info.run_id, metric))
    requested = range(driver.trials)
    expected = {(number, metric, epoch) for number in requested for metric in METRICS for epoch in range(1, EPOCHS + 1)}
    return {
        "tracebacks of the driver": (driver.folder / "driver.log").read_text().count("Traceback"),
        "trials asked": len(requested),
        "trials finished": len(complete & finished),
        "trials lost": len(set(requested) - (complete & finished)),
        "epochs asked": len(requested) * EPOCHS,
        "epochs logged": len({(number, epoch) for number, _, epoch in logged}),
        "epochs missing": len({(number, epoch) for number, _, epoch in expected - set(logged)}),
        "epochs duplicated": len({(number, epoch) for (number, _, epoch), times in logged.items() if times > 1}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="wml-soak-"))
    counts = soak(options.minutes, options.seed, folder)
    for name, count in counts.items():
        print(f"{name:<48}{count:>8}")
    failed = any(counts[name] for name in ERRORS)
    print(f"logs and results are in {folder}" if failed else "nothing was lost, and nothing logged twice")
    if not failed and not counts["tracebacks of the driver"]:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
