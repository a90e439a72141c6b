"""What a study costs beside its training, and what its sampler and scheduler save."""

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
from wml_ray.search.ratios import increasing
from wml_ray.search.settings import SearchConfig, search_config
from wml_ray.search.space import Space
from wml_ray.search.study import Study
from wml_ray.tracking.runs import open_run
from wml_ray.training.worker import WorkerContext, run_worker
from wml_ray.verbs.tune import tune

ROOT = Path(__file__).parent.parent
ACCURACY = "val/accuracy/ensemble_weighted"


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder of its own with its MLflow store, and a cluster of two cores."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # MLflow's artifacts go into the working directory
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{name}/mlflow.db"
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield Path(name)
        ray.shutdown()


def _base(folder: Path, *overrides: str) -> Config:
    return load_config(ROOT / "jobs" / "search.yaml", [f"run.storage_path={folder}", *overrides])


def warm_start(trials: int = 8) -> dict[str, float]:
    """Median seconds from the moment Ray Tune asks for a trial to its first training step, actors reused."""
    with _workplace() as folder:
        base = _base(folder, "optim.epochs=1")
        space = load_space(ROOT / "tune_spaces" / "smoke.py", base)
        asked_ms: dict[int, int] = {}

        def note(sweep: Study) -> None:
            asked_ms.update({number: trial.created_ms for number, trial in sweep.trials.items()})

        settings = search_config(study="warm", trials=trials, scheduler="none", concurrent=1)
        sweep = Study(space, settings, folder / "warm", "token", note)
        run_trials(sweep, InMemoryStorage(), trial_function=_train_and_note_first_step)
        first_ms = {int(path.stem): float(path.read_text()) for path in (folder / "warm").glob("trials/*.first")}
    starts_s = [(first_ms[number] - asked_ms[number]) / 1000 for number in sorted(asked_ms)]
    return {"first trial": starts_s[0], "reused actor": statistics.median(starts_s[1:])}


def _train_and_note_first_step(settings: dict[str, Any], worker_environment: WorkerEnvironment) -> None:
    from wml_ray.training.trainer import Trainer

    plain = getattr(Trainer, "plain_step", Trainer.train_step)
    Trainer.plain_step = plain  # type: ignore[attr-defined]
    place = Path(json.loads(settings["config"])["run"]["storage_path"]) / f"{settings['trial']}.first"

    def noted(self: Any, *arguments: Any) -> Any:
        if not place.exists():
            place.write_text(str(time.time() * 1000))
        return plain(self, *arguments)

    Trainer.train_step = noted  # type: ignore[method-assign]
    train_trial(settings, worker_environment)


def tune_cost(trials: int = 20) -> dict[str, float]:
    """Seconds of the same trials of 10 epochs, one at a time: under Ray Tune with MLflow, and in a bare loop."""
    with _workplace() as folder:
        space = load_space(ROOT / "tune_spaces" / "smoke.py", _base(folder, "optim.epochs=10"))
        settings = search_config(study="cost", trials=trials, scheduler="none", concurrent=1, sampler="random")
        parent = open_run("cost", "cost", "token", {})
        sweep = Study(space, settings, folder / "cost", "token")
        sweep.publish_to(parent)
        start_s = time.perf_counter()
        run_trials(sweep, InMemoryStorage())
        sweep.close(60)
        tuned_s = time.perf_counter() - start_s
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for trial in sweep.trials.values():
            config = sweep.config(trial)
            config = config.model_copy(update={"run": config.run.model_copy(update={"storage_path": name})})
            run_worker(config, WorkerContext())
    return {"Ray Tune": tuned_s, "bare loop": time.perf_counter() - start_s}


def many_trials(sampler: str, trials: int = 1000) -> dict[str, float]:
    """Seconds a trial of nothing takes its driver, sampler and MLflow included: the first hundred, and the last."""
    with _workplace() as folder:
        space = load_space(ROOT / "tune_spaces" / "wml.py", _base(folder, "optim.epochs=1"))
        ended_s: list[float] = []

        def note(sweep: Study) -> None:
            done = len(sweep.trials) - sweep.counts()["RUNNING"]
            if done > len(ended_s):
                ended_s.append(time.perf_counter())

        settings = search_config(study="many", trials=trials, sampler=sampler)
        parent = open_run("many", "many", "token", {})
        sweep = Study(space, settings, folder / "many", "token", note)
        sweep.publish_to(parent)
        run_trials(sweep, InMemoryStorage(), trial_function=_report_nothing)
        sweep.close(600)
    return {"first 100": (ended_s[100] - ended_s[0]) / 100, "last 100": (ended_s[-1] - ended_s[-101]) / 100}


def _report_nothing(settings: dict[str, Any], worker_environment: WorkerEnvironment) -> None:
    value = (settings["trial"] * 0.6180339) % 1
    metrics = {ACCURACY: value, "peers/macs/tree": value}
    entry = {"epoch": 1, "timestamp_ms": 0, "metrics": metrics}
    ray.tune.report({"epoch": 1, **metrics, "report": {**entry, "sizes": {"peers/macs/tree": 1.0}, "final": entry}})


def epochs_to_the_best_of_random(seeds: int = 3, trials: int = 20) -> list[dict[str, float]]:
    """Epochs that TPE with ASHA trains until it has the best score of a random search without stopping, a seed each."""
    found = []
    with _workplace() as folder:
        for seed in range(seeds):
            base = _base(folder, f"seed={seed}", "optim.epochs=9")
            domains = {
                "pruning.ratios": increasing(0.0, 0.5),
                "wml.alpha": ray.tune.uniform(0.0, 1.0),
                "wml.mirror_step_size": ray.tune.loguniform(0.001, 1.0),
                "optim.learning_rate": ray.tune.loguniform(0.003, 1.0),
            }
            space = make_space(base, domains, {ACCURACY: "max"})
            plain = search_config(study=f"random{seed}", trials=trials, sampler="random", scheduler="none", seed=seed)
            tuned = search_config(study=f"tpe{seed}", trials=3 * trials, seed=seed)
            best, epochs = _best_and_epochs(space, plain)
            needed, reached = _epochs_until(space, tuned, best)
            found.append({"seed": seed, "best": best, "random": epochs, "tpe_asha": needed, "reached": reached})
    return found


def _best_and_epochs(space: Space, settings: SearchConfig) -> tuple[float, int]:
    trials = tune(space, settings).study.trials  # type: ignore[union-attr]
    return float(trials[ACCURACY].max()), int(trials["epochs"].sum())


def _epochs_until(space: Space, settings: SearchConfig, wanted: float) -> tuple[int, float]:
    """Epochs trained by all trials together when the first complete one is as good as wanted, and what it has."""

    class Reached(Exception):
        pass

    at: list[tuple[int, float]] = []

    def look(sweep: Study) -> None:
        best = sweep.best()
        if best is not None and sweep.values(best)[0] >= wanted:
            at.append((sweep.epochs, sweep.values(best)[0]))
            raise Reached

    try:
        outcome = tune(space, settings, look)
    except Exception:
        if not at:
            raise
        return at[0]
    assert outcome.study is not None
    return int(outcome.study.trials["epochs"].sum()), float(outcome.study.trials[ACCURACY].max())
