"""The smallest study: two keys, a function call, a table. Two minutes on a laptop.

python jobs/01_smoke.py [--trials N] [key=value ...]
"""

import argparse
from pathlib import Path

import wml_ray

HERE = Path(__file__).parent


def main(overrides: list[str], trials: int) -> wml_ray.Study:
    base = wml_ray.load_config(HERE / "search.yaml", overrides)
    space = wml_ray.load_space(HERE.parent / "tune_spaces" / "smoke.py", base)
    result = wml_ray.tune(space, wml_ray.SearchConfig(study="smoke", trials=trials))
    print(result.study.trials[["trial", "state", "epochs", *space.searched, *space.objectives]].to_string(index=False))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--trials", metavar="N", type=int, default=8)
    main(**vars(parser.parse_intermixed_args()))
