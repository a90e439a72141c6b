"""One process at a time in a folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from wml_ray.config import UserError


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold this machine's lock on a run's or a study's folder; it falls with the process, however that ends.

    Raises:
        UserError: another process holds it.
    """
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"wml_ray-{os.getuid()}-{name}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait for it, or stop it first") from None
