"""Accuracy up, MACs down. New here: two objectives, NSGA-II on full trials, and the Pareto front as a DataFrame.

python jobs/03_pareto.py [key=value ...]
"""

import sys
from pathlib import Path

from wml_ray.cluster.space import load_space
from wml_ray.config.load import load_config
from wml_ray.report.analysis import pareto_front
from wml_ray.search.settings import search_config
from wml_ray.verbs.progress import StudyProgress
from wml_ray.verbs.tune import StudyResult, tune

HERE = Path(__file__).parent


def main(overrides: list[str], trials: int = 40) -> StudyResult:
    base = load_config(HERE / "search.yaml", overrides)
    space = load_space(HERE.parent / "tune_spaces" / "pareto.py", base)
    search = search_config(study="pareto", trials=trials, sampler="nsga2", scheduler="none")
    with StudyProgress() as progress:
        outcome = tune(space, search, progress)
    on_front = outcome.study.trials.set_index("trial").loc[pareto_front(outcome.study)]
    print(on_front[[*space.objectives, *space.searched]].to_string())
    return outcome


if __name__ == "__main__":
    main(sys.argv[1:])
