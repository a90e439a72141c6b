"""`python -m wml_ray` is `wml-ray`."""

import sys

from wml_ray.cli import main

sys.exit(main())
