"""The epochs that each sampler and scheduler needs until one complete trial has the best score of a random search.

python benchmarks/samplers.py [--seeds N] [--epochs N] [SAMPLER+SCHEDULER]...      without names, all of CANDIDATES
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import ray.tune
from search import ACCURACY, base_config, temporary_workplace

from wml_ray.cluster.space import make_space
from wml_ray.search.ratios import increasing
from wml_ray.search.settings import SearchConfig
from wml_ray.search.space import Space
from wml_ray.search.study import RunningStudy
from wml_ray.verbs.tune import tune

EPOCHS, TRIALS, SEEDS = 9, 20, 5
CANDIDATES = ("tpe+asha", "tpe+hyperband", "cmaes+asha", "gp+median", "random+asha")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="*", default=CANDIDATES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of a trial that is not stopped")
    options = parser.parse_args()
    found = epochs_to_the_best_of_random(options.seeds, options.candidates, options.epochs)
    print("\n| sampler + scheduler | " + " | ".join(f"seed {row['seed']}" for row in found) + " | median |")
    for name in options.candidates:
        shares = [*(row[name] for row in found), median_share(found, name)]
        print(f"| {name} | " + " | ".join(map(_shown, shares)) + " |")


def epochs_to_the_best_of_random(
    seeds: int = SEEDS, candidates: Sequence[str] = CANDIDATES[:1], trial_epochs: int = EPOCHS
) -> list[dict[str, Any]]:
    """For each seed, the share of the epochs of a random search without stopping that each candidate needs.

    A candidate that has not reached the best score of the random search after as many epochs has None.
    """
    found = []
    importable = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # the backbone
    with mock.patch.dict(os.environ, PYTHONPATH=importable), temporary_workplace() as folder:
        for seed in range(seeds):
            space = _space(folder, seed, trial_epochs)
            plain = SearchConfig(
                study=f"random{seed}", trials=TRIALS, sampler="random", scheduler="none", seed=seed + 100
            )
            trials = tune(space, plain).study.trials  # type: ignore[union-attr]
            best, epochs = float(trials[ACCURACY].max()), int(trials["epochs"].sum())
            row: dict[str, Any] = {"seed": seed, "best": best, "random": epochs}
            print(seed, f"random: {best:.4f} in {epochs} epochs", flush=True)
            for name in candidates:
                sampler, scheduler = name.split("+")
                settings: dict[str, Any] = {"sampler": sampler, "scheduler": scheduler, "trials": 3 * TRIALS}
                study = SearchConfig(study=f"{sampler}-{scheduler}-{seed}", seed=seed, **settings)
                needed = _epochs_until(space, study, best, epochs)
                row[name] = needed and needed / epochs
                print(seed, name, _shown(row[name]), flush=True)
            found.append(row)
    return found


def _space(folder: Path, seed: int, epochs: int) -> Space:
    overrides = [f"seed={seed}", f"optim.epochs={epochs}", "model.backbone=small_resnet:half_resnet8"]
    domains = {
        "pruning.ratios": increasing(0.0, 0.5),
        "wml.alpha": ray.tune.uniform(0.0, 1.0),
        "wml.mirror_step_size": ray.tune.loguniform(0.001, 1.0),
        "optim.learning_rate": ray.tune.loguniform(0.003, 1.0),
    }
    return make_space(base_config(folder, *overrides), domains, {ACCURACY: "max"})


def median_share(found: Sequence[dict[str, Any]], name: str) -> float:
    """The median over the seeds; infinity where most seeds have none."""
    return statistics.median(math.inf if row[name] is None else row[name] for row in found)


def _epochs_until(space: Space, settings: SearchConfig, target: float, limit: int) -> int | None:
    """Epochs trained by all trials until the first complete one has `target`; None if that takes over `limit`."""

    class Ended(Exception):
        pass

    ended: list[int | None] = []

    def check(study: RunningStudy) -> None:
        best = study.best()
        reached = best is not None and study.values(best)[0] >= target
        if reached or study.epochs > limit:
            ended.append(study.epochs if study.epochs <= limit else None)
            raise Ended

    try:
        tune(space, settings, check)
    except Exception:
        if not ended:
            raise
    return ended[0] if ended else None


def _shown(share: float | None) -> str:
    return "> 1" if share is None or share == math.inf else f"{share:.2f}"


if __name__ == "__main__":
    main()
