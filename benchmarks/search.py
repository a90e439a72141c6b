"""The overhead of a study, and the epochs that its sampler and scheduler save.

python benchmarks/search.py --trials 10000 --sampler tpe   the last trials of so many, with MLflow on PostgreSQL
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.tune
import torch
from optuna.storages import InMemoryStorage

from wml_ray.cluster.connect import WorkerEnvironment
from wml_ray.cluster.space import load_space
from wml_ray.cluster.trial import train_trial
from wml_ray.cluster.tune import run_trials
from wml_ray.config.load import load_config
from wml_ray.config.schema import Config
from wml_ray.search.publisher import Publisher
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space
from wml_ray.search.study import RunningStudy
from wml_ray.search.trials import TrialStore
from wml_ray.tracking.client import client_of
from wml_ray.tracking.runs import open_run
from wml_ray.tracking.tags import TOKEN_TAG, TRIAL_TAG
from wml_ray.training.worker import WorkerContext, run_worker
from wml_ray.verbs.progress import StudyProgress
from wml_ray.verbs.tune import tune

ROOT = Path(__file__).parent.parent
ACCURACY = "val/accuracy/ensemble_weighted"
HUNDRED, WARM_UP = 100, 10  # trials that are timed, and those before them in a new study, when actors start


@contextmanager
def temporary_workplace(uri: str | None = None) -> Iterator[Path]:
    """A temporary working directory with an MLflow store, or the one at `uri`, and a cluster of two cores."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # MLflow's artifacts go into the working directory
        os.environ["MLFLOW_TRACKING_URI"] = uri or f"sqlite:///{name}/mlflow.db"
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield Path(name)
        ray.shutdown()


def base_config(folder: Path, *overrides: str) -> Config:
    return load_config(ROOT / "jobs" / "search.yaml", [f"run.storage_path={folder}", *overrides])


def warm_start(trials: int = 8) -> dict[str, float]:
    """Seconds from the suggestion of a trial to its first training step: the first trial, and the median of others."""
    with temporary_workplace() as folder:
        base = base_config(folder, "optim.epochs=1")
        space = load_space(ROOT / "tune_spaces" / "smoke.py", base)
        suggested_ms: dict[int, int] = {}

        def record(study: RunningStudy) -> None:
            suggested_ms.update({number: trial.created_ms for number, trial in study.trials.items()})

        settings = SearchConfig(study="warm", trials=trials, scheduler="none", concurrent=1)
        study = RunningStudy(space, settings, folder / "warm", "token", record)
        run_trials(study, InMemoryStorage(), trial_function=_train_and_record_first_step)
        first_ms = {int(path.stem): float(path.read_text()) for path in (folder / "warm").glob("trials/*.first")}
    starts_s = [(first_ms[number] - suggested_ms[number]) / 1000 for number in sorted(suggested_ms)]
    return {"first trial": starts_s[0], "reused actor": statistics.median(starts_s[1:])}


def _train_and_record_first_step(settings: dict[str, Any], worker_environment: WorkerEnvironment) -> None:
    from wml_ray.training.trainer import Trainer

    train_step = getattr(Trainer, "original_step", Trainer.train_step)
    Trainer.original_step = train_step  # type: ignore[attr-defined]
    path = Path(json.loads(settings["config"])["run"]["storage_path"]) / f"{settings['trial']}.first"

    def timed_step(self: Any, *arguments: Any) -> Any:
        if not path.exists():
            path.write_text(str(time.time() * 1000))
        return train_step(self, *arguments)

    Trainer.train_step = timed_step  # type: ignore[method-assign]
    train_trial(settings, worker_environment)


def tune_cost(trials: int = 20) -> dict[str, float]:
    """Seconds of the same trials of 10 epochs, one at a time: under Ray Tune with MLflow, and in a bare loop."""
    with temporary_workplace() as folder:
        space = load_space(ROOT / "tune_spaces" / "smoke.py", base_config(folder, "optim.epochs=10"))
        settings = SearchConfig(study="cost", trials=trials, scheduler="none", concurrent=1, sampler="random")
        parent = open_run("cost", "cost", "token", {})
        study = RunningStudy(space, settings, folder / "cost", "token")
        publisher = Publisher(study, parent)
        start_s = time.perf_counter()
        run_trials(study, InMemoryStorage())
        publisher.close(60)
        tuned_s = time.perf_counter() - start_s
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for trial in study.trials.values():
            config = study.config(trial)
            config = config.model_copy(update={"run": config.run.model_copy(update={"storage_path": name})})
            run_worker(config, WorkerContext())
    return {"Ray Tune": tuned_s, "bare loop": time.perf_counter() - start_s}


def many_trials(sampler: str, trials: int = 1000) -> dict[str, float]:
    """Seconds for each trial without training, sampler and MLflow included: the first hundred, and the last."""
    with temporary_workplace() as folder:
        space = load_space(ROOT / "tune_spaces" / "wml.py", base_config(folder, "optim.epochs=1"))
        ended_s: list[float] = []

        def record(study: RunningStudy) -> None:
            done = len(study.trials) - study.counts()["RUNNING"]
            if done > len(ended_s):
                ended_s.append(time.perf_counter())

        settings = SearchConfig(study="many", trials=trials, sampler=sampler)
        parent = open_run("many", "many", "token", {})
        study = RunningStudy(space, settings, folder / "many", "token", record)
        publisher = Publisher(study, parent)
        run_trials(study, InMemoryStorage(), trial_function=_report_without_training)
        publisher.close(600)
    return {"first 100": (ended_s[100] - ended_s[0]) / 100, "last 100": (ended_s[-1] - ended_s[-101]) / 100}


class _Clock:
    """Wall and CPU seconds of this process when the study gets its next trial."""

    def __init__(self, progress: StudyProgress) -> None:
        self.progress = progress
        self.seen: dict[int, tuple[float, float]] = {}  # by number of trials

    def __call__(self, study: RunningStudy) -> None:
        self.progress(study)
        now = time.perf_counter(), time.process_time()
        self.seen |= dict.fromkeys(range(max(self.seen, default=0) + 1, len(study.trials) + 1), now)

    def a_trial(self, last: int, trials: int) -> dict[str, float]:
        """Seconds a trial of the `trials` trials up to `last`."""
        (wall, cpu), (wall_after, cpu_after) = self.seen[last - trials], self.seen[last]
        return {"wall_s": (wall_after - wall) / trials, "cpu_s": (cpu_after - cpu) / trials}


def large_study(trials: int, sampler: str, out: Path) -> dict[str, Any]:
    """The first and the last hundred trials of a study of trials without training, and `wml-ray report` of it.

    All trials between them are made: as trial files, and as rows of MLflow's PostgreSQL database. So the last hundred
    trials are those of a study that continues. Pictures are written to the folder `out`.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from postgres import postgres

    with postgres() as server:
        client_of(server.url).search_experiments()  # creates the tables, which takes longer than a study would wait
        with temporary_workplace(server.url) as folder:
            space = load_space(ROOT / "tune_spaces" / "wml.py", base_config(folder, "optim.epochs=2"))
            found = {f"first {HUNDRED}": _first_or_last(space, sampler, HUNDRED + WARM_UP)}
            made = trials - HUNDRED - WARM_UP
            _make_trials(space, folder / "large", server.url, made)
            found[f"last {HUNDRED}"] = _first_or_last(space, sampler, trials)
            found["report"] = _report(out)
    return found


def _first_or_last(space: Space, sampler: str, trials: int) -> dict[str, float]:
    """Continue the study to this number of trials: seconds a trial, before the first and after the last trial."""
    import wml_ray.cluster.tune as cluster_tune

    cluster_tune.train_trial = _report_without_training
    settings = SearchConfig(study="large", trials=trials, sampler=sampler, grace_epochs=1)
    start_s = time.perf_counter()
    with StudyProgress() as progress:
        clock = _Clock(progress)
        tune(space, settings, clock)
    seconds = [wall for wall, _ in clock.seen.values()]
    around = {
        "memory, MiB": _memory_mib("self", "VmRSS"),
        "before_s": seconds[0] - start_s,
        "after_s": time.perf_counter() - seconds[-1],
    }
    return {**clock.a_trial(trials, HUNDRED), **around}


def _make_trials(space: Space, folder: Path, url: str, stop: int) -> None:
    """Give the study trials up to the number `stop`, at random points: copies of those that it has."""
    import psycopg

    store, random = TrialStore(folder), np.random.default_rng(0)
    sources, changes = store.trials(), {}
    for number in range(len(sources), stop):
        source, metrics = sources[number % len(sources)], _metrics(number)
        point = {name: random.uniform(domain.low, domain.high) for name, domain in space.distributions.items()}
        history = [{**entry, "metrics": metrics} for entry in source.history]
        final = source.final and {**source.final, "metrics": metrics}
        store.write(replace(source, number=number, point=point, history=history, final=final))
        ratios = {f"pruning.ratios.{peer}": ratio for peer, ratio in enumerate(space.values(point)["pruning.ratios"])}
        changes[number] = {**point, **ratios, **metrics, TRIAL_TAG: number, TOKEN_TAG: f"made-{number}"}
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        tags = _rows(connection, "tags")
        runs = {row["value"]: run for run, rows in tags.items() for row in rows if row["key"] == TRIAL_TAG}
        for table in ("runs", "params", "tags", "metrics", "latest_metrics"):
            rows = _rows(connection, table)
            columns = list(next(iter(rows.values()))[0])
            copy = f"COPY {table} ({', '.join(columns)}) FROM STDIN"
            with connection.cursor() as cursor, cursor.copy(copy) as writer:
                for number, changed in changes.items():
                    for row in rows.get(runs[str(number % len(sources))], []):
                        value = changed.get(row.get("key"), row.get("value"))
                        new = {**row, "value": value, "run_uuid": f"{number:032x}"}
                        writer.write_row([new[column] for column in columns])
        connection.execute("ANALYZE")


def _rows(connection: Any, table: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of one of MLflow's tables by the id of their run."""
    from psycopg.rows import dict_row

    found: dict[str, list[dict[str, Any]]] = {}
    for row in connection.cursor(row_factory=dict_row).execute(f"SELECT * FROM {table}"):
        found.setdefault(row["run_uuid"], []).append(row)
    return found


def _report(out: Path) -> dict[str, float]:
    """Wall and CPU seconds and the most memory of `wml-ray report` in a process of its own."""
    command = [str(Path(sys.executable).with_name("wml-ray")), "report", "large", "--out", str(out)]
    start_s, process, memory = time.perf_counter(), subprocess.Popen(command), 0.0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    while process.poll() is None:
        memory = max(memory, _memory_mib(str(process.pid), "VmHWM"))
        time.sleep(0.1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.perf_counter() - start_s, "cpu_s": cpu_s, "memory, MiB": memory}


def _memory_mib(process: str, kind: str) -> float:
    """The memory of a process, now (VmRSS) or at most (VmHWM); 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(kind)), 0.0)


def _metrics(number: int) -> dict[str, float]:
    value = (number * 0.6180339) % 1
    return {ACCURACY: value, "val/accuracy/method": value, "peers/macs/tree": 1e6 * (1 + value)}


def _report_without_training(settings: dict[str, Any], worker_environment: WorkerEnvironment) -> None:
    metrics = _metrics(settings["trial"])
    epochs = json.loads(settings["config"])["optim"]["epochs"]
    for epoch in range(1, epochs + 1):
        entry = {"epoch": epoch, "timestamp_ms": 0, "metrics": metrics}
        report = {**entry, "sizes": {"peers/macs/tree": 1.0}, **({"final": entry} if epoch == epochs else {})}
        ray.tune.report({"epoch": epoch, **metrics, "report": json.dumps(report)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10000)
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder of the report and its pictures")
    options = parser.parse_args()
    print(json.dumps(large_study(options.trials, options.sampler, options.out.resolve()), indent=1))


if __name__ == "__main__":
    main()
