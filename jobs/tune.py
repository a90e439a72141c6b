"""`wml-ray tune` as the command of a Ray job: the package comes with the working directory, installed or not.

ray job submit --working-dir . -- python jobs/tune.py jobs/search.yaml --space tune_spaces/pareto.py --trials 20
python jobs/submit.py tune jobs/search.yaml --space tune_spaces/pareto.py --trials 20        # see jobs/train.py
"""

import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from wml_ray.submit.entry import on_cluster

    return on_cluster("tune", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
