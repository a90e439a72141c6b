"""The title of a run, its name in MLflow."""

from __future__ import annotations

from collections import Counter
from typing import Any

from wml_ray.config.schema import Config
from wml_ray.errors import shortened
from wml_ray.methods.settings import is_own_method, unused_sections
from wml_ray.storage.paths import to_path

MAX_TITLE = 200
LAST_SECTIONS = ("model", "optim", "data", "seed")
NOT_SHOWN = (
    *("data.name", "data.root", "data.download", "data.loader_workers", "data.cache_", "model.backbone"),
    *("scale.", "run."),
)
"""Keys at the start of the title, and keys that decide where a run is and not its numbers."""


def run_title(config: Config) -> str:
    """Dataset, backbone and the values that differ from the defaults: `digits-resnet20 alpha=0.3 seed=1`.

    The method and its settings come first and the seed last, as MLflow cuts the end of a title in its tables. Unused
    sections are left out.
    """
    defaults = _values(Config(), left_out=set())
    values = _values(config, left_out=unused_sections(config.method.name))
    changed = {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}
    shown = {key: value for key, value in changed.items() if not key.startswith(NOT_SHOWN)}
    last_words = Counter(key.rpartition(".")[2] for key in shown)
    words = [f"{_short(key, last_words)}={_text(value)}" for key, value in shown.items()]
    backbone = config.model.backbone.rsplit(":", 1)[-1]
    return shortened(" ".join([f"{config.data.name}-{backbone}", *words]), MAX_TITLE)


def _values(config: Config, left_out: set[str]) -> dict[str, Any]:
    """Dotted keys to values, lists whole, in the order of the title; without the sections `left_out`."""
    dump = config.model_dump(mode="json", exclude=left_out)
    settings = dump["method"].pop("settings") if is_own_method(config.method.name) else {}
    dump["method"] = {"name": config.method.name, **{f"settings.{key}": value for key, value in settings.items()}}
    first = [name for name in ("method", config.method.name) if name in dump]
    middle = (name for name in dump if name not in (*first, *LAST_SECTIONS))
    values: dict[str, Any] = {}
    for section in (*first, *middle, *LAST_SECTIONS):
        if isinstance(dump[section], dict):
            values |= {f"{section}.{key}": value for key, value in dump[section].items()}
        else:
            values[section] = dump[section]
    if config.model.pretrained:
        values["model.pretrained"] = to_path(config.model.pretrained).name
    if "teacher" in dump:
        values["teacher.run"] = config.teacher.run_id
    return values


def _short(key: str, last_words: Counter[str]) -> str:
    """The last word of a key; the section for `name` and `run`, the whole key if another ends with the same word."""
    section, _, last = key.rpartition(".")
    if last in ("name", "run"):
        return section
    return last if last_words[last] == 1 else key


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
