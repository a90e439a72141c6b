"""The settings of Ray's client, made before Ray is imported; the token of this machine."""

from __future__ import annotations

import os
from pathlib import Path


def ray_token() -> tuple[str, str]:
    """Ray's token on this machine, empty if there is none, and its source, in Ray's order."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token, "RAY_AUTH_TOKEN"
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip(), str(path)
    except OSError:
        return "", str(path)


def configure_ray() -> None:
    """Set Ray's variables for the token of this machine and a short connection timeout, read at its import."""
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", "8")
    if ray_token()[0]:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
