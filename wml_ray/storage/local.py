"""Files of a local or mounted file system."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from wml_ray.errors import UserError


class NotRegularFile(UserError):
    """A folder, link, pipe or device where a file is expected."""


def check_regular(path: Path) -> None:
    """Check that a file can be opened without blocking and without leaving its folder.

    Raises:
        FileNotFoundError: there is no such file.
        NotRegularFile: it is a folder, a symbolic link, a pipe, a socket or a device.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise NotRegularFile(f"{path} is not a regular file; remove it or restore the file")


def flush(path: Path) -> None:
    """Write the buffers of a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
