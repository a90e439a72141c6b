"""Nested settings, as JSON holds them: their dotted keys, and the code of users that they name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wml_ray.settings import LIBRARIES


def functions_named_in(raw: Any) -> dict[str, str]:
    """The keys of nested settings that name a user's own `package.module:name`, and these names.

    The settings may be of any kind, as in a checkpoint that was not checked yet.
    """
    named = {}
    for key in ("model.backbone", "method.name", "teacher.function"):
        section, _, last = key.partition(".")
        settings = raw.get(section) if isinstance(raw, dict) else None
        name = settings.get(last) if isinstance(settings, dict) else None
        if isinstance(name, str) and ":" in name and not (key == "model.backbone" and name.split(":")[0] in LIBRARIES):
            named[key] = name
    return named


def flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted keys below `prefix` and their scalars; an empty list is one."""
    if isinstance(value, dict) or (isinstance(value, list) and value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value
