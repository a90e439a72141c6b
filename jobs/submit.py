"""`python jobs/submit.py train ...` is `wml-ray submit train ...`, for a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from wml_ray.cli.main import main

sys.exit(main(["submit", *sys.argv[1:]]))
