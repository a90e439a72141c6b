"""Accuracy up, MACs down. New here: two objectives, NSGA-II on full trials, and the Pareto front as a DataFrame.

python jobs/03_pareto.py [--trials N] [key=value ...]
"""

import argparse
from pathlib import Path

import wml_ray

HERE = Path(__file__).parent


def main(overrides: list[str], trials: int) -> wml_ray.Study:
    base = wml_ray.load_config(HERE / "search.yaml", overrides)
    space = wml_ray.load_space(HERE.parent / "tune_spaces" / "pareto.py", base)
    search = wml_ray.SearchConfig(study="pareto", trials=trials, sampler="nsga2", scheduler="none")
    result = wml_ray.tune(space, search)
    on_front = result.study.trials.set_index("trial").loc[wml_ray.pareto_front(result.study)]
    print(on_front[[*space.objectives, *space.searched]].to_string())
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--trials", metavar="N", type=int, default=40)
    main(**vars(parser.parse_intermixed_args()))
