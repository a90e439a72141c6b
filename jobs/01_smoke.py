"""The smallest sweep: two knobs, a function call, a table. Two minutes on a laptop.

python jobs/01_smoke.py [key=value ...]
"""

import sys
from pathlib import Path

from wml_ray.cluster.space import load_space
from wml_ray.config.load import load_config
from wml_ray.search.settings import search_config
from wml_ray.verbs.progress import StudyProgress
from wml_ray.verbs.tune import StudyResult, tune

HERE = Path(__file__).parent


def main(overrides: list[str], trials: int = 8) -> StudyResult:
    base = load_config(HERE / "search.yaml", overrides)
    space = load_space(HERE.parent / "tune_spaces" / "smoke.py", base)
    with StudyProgress() as progress:
        outcome = tune(space, search_config(study="smoke", trials=trials), progress)
    print(outcome.study.trials[["trial", "state", "epochs", *space.searched, *space.objectives]].to_string(index=False))
    return outcome


if __name__ == "__main__":
    main(sys.argv[1:])
