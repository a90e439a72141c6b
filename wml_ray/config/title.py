"""The name of a run for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from wml_ray.config.schema import Config

MAX_TITLE = 200
NOT_SHOWN = ("data.name", "data.root", "data.download", "data.loader_workers", "model.backbone", "scale.", "run.")
"""Keys in front of the title, and keys that change where a run is and not its numbers."""


def run_title(config: Config) -> str:
    """Dataset, backbone and the values that differ from the defaults: `digits-resnet20 alpha=0.3 seed=1`.

    The sections come in reverse order, the seed last: the end of a long title is cut in narrow columns.
    """
    defaults = _values(Config().model_dump(mode="json"))
    changed = {key: value for key, value in _values(config.dump()).items() if value != defaults.get(key)}
    shown = {key: value for key, value in changed.items() if not key.startswith(NOT_SHOWN)}
    last_words = Counter(key.rpartition(".")[2] for key in shown)
    words = [f"{_short(key, last_words)}={_text(value)}" for key, value in shown.items()]
    backbone = config.model.backbone.rsplit(":", 1)[-1]
    title = " ".join([f"{config.data.name}-{backbone}", *words])
    return title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"


def _values(dump: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys to values, lists whole."""
    values: dict[str, Any] = {}
    for section, content in reversed(dump.items()):
        if isinstance(content, dict):
            values |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            values[section] = content
    return values


def _short(key: str, last_words: Counter[str]) -> str:
    """The last word of a key; the section for `name`, the whole key where another one ends with the same word."""
    section, _, last = key.rpartition(".")
    if last == "name":
        return section
    return last if last_words[last] == 1 else key


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
