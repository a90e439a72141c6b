"""The settings of the paper. New here: a space in the script, points to start from, and a storage others can read.

python jobs/02_wml.py [--trials N] [key=value ...]
optuna-dashboard sqlite:///optuna.db        # meanwhile, in another terminal (pip install optuna-dashboard)
"""

import argparse
from pathlib import Path

from ray.tune import loguniform, uniform

import wml_ray

CONFIG = Path(__file__).parent / "search.yaml"


def main(overrides: list[str], trials: int) -> wml_ray.Study:
    base = wml_ray.load_config(CONFIG, overrides)
    domains = {
        "pruning.ratios": wml_ray.increasing(0.0, 0.5),
        "wml.alpha": uniform(0.0, 1.0),
        "wml.mirror_step_size": loguniform(0.001, 1.0),
    }
    space = wml_ray.make_space(base, domains, {"val/accuracy/ensemble_weighted": "max"})
    known_good = ["pruning.ratios=[0.0, 0.1, 0.2, 0.3]", *overrides]
    start = [space.point(wml_ray.load_config(CONFIG, [*known_good, f"wml.alpha={alpha}"])) for alpha in (0.3, 0.7)]
    search = wml_ray.SearchConfig(study="wml-knobs", trials=trials, storage="sqlite:///optuna.db")
    result = wml_ray.tune(space, search, start=start)
    complete = result.study.trials.query("state == 'COMPLETE'")
    best = complete.sort_values("val/accuracy/ensemble_weighted", ascending=False)
    print(best[["trial", "state", *space.searched, *space.objectives]].head(5).to_string(index=False))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--trials", metavar="N", type=int, default=20)
    main(**vars(parser.parse_intermixed_args()))
