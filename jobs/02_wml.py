"""The paper's knobs. New here: a space written in the script, points to start from, and a storage others can look at.

python jobs/02_wml.py [key=value ...]
optuna-dashboard sqlite:///optuna.db        # meanwhile, in another terminal (pip install optuna-dashboard)
"""

import sys
from pathlib import Path

from ray.tune import loguniform, uniform

from wml_ray.cluster.space import make_space
from wml_ray.config.load import load_config, with_values
from wml_ray.search.ratios import increasing
from wml_ray.search.settings import search_config
from wml_ray.verbs.progress import StudyProgress
from wml_ray.verbs.tune import StudyResult, tune

HERE = Path(__file__).parent


def main(overrides: list[str], trials: int = 20) -> StudyResult:
    base = load_config(HERE / "search.yaml", overrides)
    domains = {
        "pruning.ratios": increasing(0.0, 0.5),
        "wml.alpha": uniform(0.0, 1.0),
        "wml.mirror_step_size": loguniform(0.001, 1.0),
    }
    space = make_space(base, domains, {"val/accuracy/ensemble_weighted": "max"})
    known_good = [{"pruning.ratios": [0.0, 0.1, 0.2, 0.3], "wml.alpha": alpha} for alpha in (0.3, 0.7)]
    start = [space.point(with_values(base, values)) for values in known_good]
    search = search_config(study="wml-knobs", trials=trials, storage="sqlite:///optuna.db")
    with StudyProgress() as progress:
        outcome = tune(space, search, progress, start)
    complete = outcome.study.trials.query("state == 'COMPLETE'")
    best = complete.sort_values("val/accuracy/ensemble_weighted", ascending=False)
    print(best[["trial", "state", *space.searched, *space.objectives]].head(5).to_string(index=False))
    return outcome


if __name__ == "__main__":
    main(sys.argv[1:])
