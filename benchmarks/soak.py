"""A study under fire: its trials, its driver and its MLflow server are killed at random, and nothing may be lost.

python benchmarks/soak.py --minutes 10 --seed 0

What is killed, and after how long, follows from the seed. The last start is left in peace. Exit status 1 if a trial or
an epoch is lost, or one is logged twice.
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
STUDY, EPOCHS, TRIALS = "soak", 8, 4  # trials asked for at first, and again whenever they are done
VICTIMS = ("trial", "trial", "driver", "server")  # dealt as from a deck of cards
PAUSE_S = (3.0, 10.0)  # between two kills
AWAY_S = (1.0, 6.0)  # how long a killed server stays away before it is started again
BAD = ("trials lost", "epochs missing", "epochs duplicated", "exit status of the last start")
METRICS = ("train/loss", "val/accuracy/peer0", "weights/peer0")


class Server:
    """An MLflow server over an sqlite file."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.folder = f"http://127.0.0.1:{self.port}", folder
        self.starts_s = 0.0  # when it is to be started again
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen processes less to start
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def wait(self) -> None:
        """Until it answers, started if it is away."""
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
    """`wml-ray tune`, always the same command; more trials are asked for when all are done."""

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
        """Actors that train now."""
        try:
            return [one for one in self.process.children(recursive=True) if _trains(one)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """The driver alone; Ray's processes are to see by themselves that it is gone."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _trains(process: psutil.Process) -> bool:
    try:
        return "trial-" in process.cwd() and process.name().startswith("ray::")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def soak(minutes: float, seed: int, folder: Path) -> dict[str, int]:
    """Kill until the time is up, then let the study finish; the ledger."""
    draw, deck = random.Random(seed), list[str]()
    done = Counter({f"{victim}s killed": 0 for victim in dict.fromkeys(VICTIMS)})
    server = Server(folder)
    driver = Driver(folder, server.uri)
    try:
        server.wait()
        driver.start()
        end_s = time.monotonic() + 60 * minutes
        kill_s = time.monotonic() + draw.uniform(*PAUSE_S)
        while time.monotonic() < end_s:
            _go_on(driver, server, done)
            if time.monotonic() > kill_s:
                deck = deck or draw.sample(VICTIMS, len(VICTIMS))
                if _killed(deck[-1], driver, server, draw):
                    done[f"{deck.pop()}s killed"] += 1
                    kill_s = time.monotonic() + draw.uniform(*PAUSE_S)
            time.sleep(0.1)
        server.wait()
        driver.process.wait()
        driver.start()  # once more and in peace: what is lacking then is lost
        done["exit status of the last start"] = driver.process.wait()
        return {**done, **_ledger(driver)}
    finally:
        driver.kill()
        server.kill()


def _go_on(driver: Driver, server: Server, done: Counter[str]) -> None:
    """Start again what is not there: the server after its time, the driver at once and with the same command."""
    if server.process is None and time.monotonic() > server.starts_s:
        server.start()
    status = driver.process.poll()
    if status is not None:
        done["starts of the driver that ended by themselves"] += status > 0  # the server was away
        driver.trials += TRIALS if status == 0 else 0
        driver.start()


def _killed(victim: str, driver: Driver, server: Server, draw: random.Random) -> bool:
    """Kill it, unless it is not at work: a driver that is killed while it starts has nothing to lose."""
    trials = driver.trial_processes()
    if victim == "server":
        if server.process is None or not server.answers():
            return False
        server.kill()
        server.starts_s = time.monotonic() + draw.uniform(*AWAY_S)
    elif not trials:
        return False
    elif victim == "driver":
        driver.kill()
    else:
        try:
            draw.choice(trials).kill()
        except psutil.NoSuchProcess:  # it has ended by itself
            return False
    return True


def _ledger(driver: Driver) -> dict[str, int]:
    """What was asked for, and what of it the study's folder and MLflow have."""
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
    asked = range(driver.trials)
    wanted = {(number, metric, epoch) for number in asked for metric in METRICS for epoch in range(1, EPOCHS + 1)}
    return {
        "tracebacks of the driver": (driver.folder / "driver.log").read_text().count("Traceback"),
        "trials asked": len(asked),
        "trials finished": len(complete & finished),
        "trials lost": len(set(asked) - (complete & finished)),
        "epochs asked": len(asked) * EPOCHS,
        "epochs logged": len({(number, epoch) for number, _, epoch in logged}),
        "epochs missing": len({(number, epoch) for number, _, epoch in wanted - set(logged)}),
        "epochs duplicated": len({(number, epoch) for (number, _, epoch), times in logged.items() if times > 1}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="wml-soak-"))
    ledger = soak(options.minutes, options.seed, folder)
    for what, count in ledger.items():
        print(f"{what:<48}{count:>8}")
    failed = any(ledger[what] for what in BAD)
    print(f"logs and results are in {folder}" if failed else "nothing was lost, and nothing logged twice")
    if not failed and not ledger["tracebacks of the driver"]:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
