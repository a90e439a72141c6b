"""`wml-ray train` as the command of a Ray job: the package comes with the working directory, installed or not.

ray job submit --working-dir . -- python jobs/train.py jobs/quickstart.yaml scale.workers=2
python jobs/submit.py train jobs/quickstart.yaml scale.workers=2        # the same, with the details taken care of
"""

import sys
from pathlib import Path


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from wml_ray.submit.entry import on_cluster

    return on_cluster("train", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
