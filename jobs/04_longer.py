"""From a cheap study to a dear one. New here: a study of short trials teaches the sampler of one with long trials.

python jobs/04_longer.py [key=value ...]
"""

import sys
from pathlib import Path

from wml_ray.cluster.space import load_space
from wml_ray.config.load import load_config
from wml_ray.search.settings import search_config
from wml_ray.verbs.progress import StudyProgress
from wml_ray.verbs.tune import StudyResult, tune

HERE = Path(__file__).parent


def main(overrides: list[str], trials: int = 12) -> StudyResult:
    for study, epochs, learn_from in (("short", 5, []), ("long", 30, ["short"])):
        base = load_config(HERE / "search.yaml", [f"optim.epochs={epochs}", *overrides])
        space = load_space(HERE.parent / "tune_spaces" / "wml.py", base)
        with StudyProgress() as progress:
            outcome = tune(space, search_config(study=study, trials=trials), progress, warm_start=learn_from)
        print(f"{study}: wml-ray train {outcome.folder / 'config.yaml'}")
    return outcome


if __name__ == "__main__":
    main(sys.argv[1:])
