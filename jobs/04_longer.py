"""From a cheap study to an expensive one. New here: the sampler of long trials learns from a study of short ones.

python jobs/04_longer.py [--trials N] [key=value ...]
"""

import argparse
from pathlib import Path

import wml_ray

HERE = Path(__file__).parent


def main(overrides: list[str], trials: int) -> wml_ray.Study:
    for study, epochs, learn_from in (("short", 5, []), ("long", 30, ["short"])):
        base = wml_ray.load_config(HERE / "search.yaml", [f"optim.epochs={epochs}", *overrides])
        space = wml_ray.load_space(HERE.parent / "tune_spaces" / "wml.py", base)
        result = wml_ray.tune(space, wml_ray.SearchConfig(study=study, trials=trials), warm_start=learn_from)
        print(f"{study}: wml-ray train {result.folder / 'config.yaml'}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--trials", metavar="N", type=int, default=12)
    main(**vars(parser.parse_intermixed_args()))
