"""`python -m wml_ray` is `wml-ray`."""

import sys

from wml_ray.cli.main import main

sys.exit(main())
