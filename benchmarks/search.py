"""The overhead of a study, and the epochs that its sampler and scheduler save."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
from optuna.storages import InMemoryStorage

from wml_ray.cluster.connect import WorkerEnvironment
from wml_ray.cluster.space import load_space, make_space
from wml_ray.cluster.trial import train_trial
from wml_ray.cluster.tune import run_trials
from wml_ray.config.load import load_config
from wml_ray.config.schema import Config
from wml_ray.search.publisher import Publisher
from wml_ray.search.ratios import increasing
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space
from wml_ray.search.study import RunningStudy
from wml_ray.tracking.runs import open_run
from wml_ray.training.worker import WorkerContext, run_worker
from wml_ray.verbs.tune import tune

ROOT = Path(__file__).parent.parent
ACCURACY = "val/accuracy/ensemble_weighted"


@contextmanager
def _temporary_workplace() -> Iterator[Path]:
    """A temporary working directory with an MLflow store, and a cluster of two cores."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # MLflow's artifacts go into the working directory
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{name}/mlflow.db"
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield Path(name)
        ray.shutdown()


def _base(folder: Path, *overrides: str) -> Config:
    return load_config(ROOT / "jobs" / "search.yaml", [f"run.storage_path={folder}", *overrides])


def warm_start(trials: int = 8) -> dict[str, float]:
    """Seconds from the suggestion of a trial to its first training step: the first trial, and the median of others."""
    with _temporary_workplace() as folder:
        base = _base(folder, "optim.epochs=1")
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
    with _temporary_workplace() as folder:
        space = load_space(ROOT / "tune_spaces" / "smoke.py", _base(folder, "optim.epochs=10"))
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
    with _temporary_workplace() as folder:
        space = load_space(ROOT / "tune_spaces" / "wml.py", _base(folder, "optim.epochs=1"))
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


def _report_without_training(settings: dict[str, Any], worker_environment: WorkerEnvironment) -> None:
    value = (settings["trial"] * 0.6180339) % 1
    metrics = {ACCURACY: value, "peers/macs/tree": value}
    entry = {"epoch": 1, "timestamp_ms": 0, "metrics": metrics}
    report = json.dumps({**entry, "sizes": {"peers/macs/tree": 1.0}, "final": entry})
    ray.tune.report({"epoch": 1, **metrics, "report": report})


def epochs_to_the_best_of_random(seeds: int = 3, trials: int = 20) -> list[dict[str, float]]:
    """For each seed, the epochs that TPE with ASHA needs for the best score of a random search without stopping."""
    found = []
    with _temporary_workplace() as folder:
        for seed in range(seeds):
            base = _base(folder, f"seed={seed}", "optim.epochs=9")
            domains = {
                "pruning.ratios": increasing(0.0, 0.5),
                "wml.alpha": ray.tune.uniform(0.0, 1.0),
                "wml.mirror_step_size": ray.tune.loguniform(0.001, 1.0),
                "optim.learning_rate": ray.tune.loguniform(0.003, 1.0),
            }
            space = make_space(base, domains, {ACCURACY: "max"})
            plain = SearchConfig(study=f"random{seed}", trials=trials, sampler="random", scheduler="none", seed=seed)
            tuned = SearchConfig(study=f"tpe{seed}", trials=3 * trials, seed=seed)
            best, epochs = _best_and_epochs(space, plain)
            needed, reached = _epochs_until(space, tuned, best)
            found.append({"seed": seed, "best": best, "random": epochs, "tpe_asha": needed, "reached": reached})
    return found


def _best_and_epochs(space: Space, settings: SearchConfig) -> tuple[float, int]:
    trials = tune(space, settings).study.trials  # type: ignore[union-attr]
    return float(trials[ACCURACY].max()), int(trials["epochs"].sum())


def _epochs_until(space: Space, settings: SearchConfig, target: float) -> tuple[int, float]:
    """Epochs trained by all trials until the first complete one reaches `target`, and its score."""

    class Reached(Exception):
        pass

    reached: list[tuple[int, float]] = []

    def check(study: RunningStudy) -> None:
        best = study.best()
        if best is not None and study.values(best)[0] >= target:
            reached.append((study.epochs, study.values(best)[0]))
            raise Reached

    try:
        result = tune(space, settings, check)
    except Exception:
        if not reached:
            raise
        return reached[0]
    assert result.study is not None
    return int(result.study.trials["epochs"].sum()), float(result.study.trials[ACCURACY].max())
