"""The one schema of a run: frozen, validated, and the only place where a setting is described."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from wml_ray.config.schema import Config, ModelConfig, PruningConfig
from wml_ray.errors import UserError, one_line
from wml_ray.settings import Section
from wml_ray.storage.paths import to_path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key=value` overrides.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value outside its range.
    """
    try:
        raw = yaml.safe_load(to_path(path).read_text())
    except OSError as error:
        raise UserError(
            f"config file {path}: {error.strerror or 'not there'}; give the path of a YAML file, see jobs/"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not valid YAML: {one_line(error)}; see jobs/ for examples") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"config file {path} holds a {type(raw).__name__}; it must hold keys such as `seed: 0`")
    return parse_config(raw, overrides)


def parse_config(raw: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate nested settings, with `key=value` overrides applied on top.

    Raises:
        UserError: an unknown key, or a value outside its range.
    """
    merged = json.loads(json.dumps(raw, default=str))
    merged = {key: value for key, value in merged.items() if value is not None or key not in Config.model_fields}
    for override in overrides:
        _apply_override(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(validation_message(error, known_keys())) from None


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Another config, with dotted keys set to `values`.

    Raises:
        UserError: an unknown key, or a value outside its range.
    """
    raw = config.model_dump(mode="json")
    for key, value in values.items():
        _set(raw, key, value)
    return parse_config(raw)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' must read key=value, for example wml.alpha=0.3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML") from error
    _set(raw, key, value)


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = raw
    for parent in parents:
        node = _child(node, parent, key)
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise UserError(f"unknown key '{key}': the list has entries 0 to {len(node) - 1}")
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"unknown key '{key}': {'.'.join(parents)} is a single value, it has no '{last}' inside")


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, dict):
        if name not in node and name in Config.model_fields:
            node[name] = {}
        if name not in node and name == "ratios":
            node[name] = list(PruningConfig().ratios)
        if name not in node and name == "sharing":
            node[name] = list(ModelConfig().sharing)
        if name in node:
            return node[name]
    raise UserError(f"unknown key '{key}'{_did_you_mean(key)}")


def known_keys() -> dict[str, Any]:
    """Every dotted config key and its pydantic field, in the order of the schema."""
    keys: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys.update({f"{name}.{key}": inner for key, inner in section.model_fields.items()})
        else:
            keys[name] = field
    return keys


def describe_keys() -> str:
    """The table of config keys as Markdown: key, default, meaning."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, field in known_keys().items():
        default = yaml.safe_dump(field.default, default_flow_style=True).removesuffix("...\n").strip()
        rows.append(f"| `{key}` | `{default}` | {_choices(field)}{field.description} |")
    return "\n".join(rows)


def _choices(field: Any) -> str:
    options = getattr(field.annotation, "__args__", ())
    if options and all(isinstance(option, str) for option in options):
        return " \\| ".join(f"`{option}`" for option in options) + ": "
    return ""


def _did_you_mean(key: str) -> str:
    section = key.split(".")[0]
    siblings = [known for known in known_keys() if known.startswith(f"{section}.")]
    last_words = {known.rpartition(".")[2]: known for known in siblings or known_keys()}
    close = get_close_matches(key.rpartition(".")[2], last_words, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{last_words[close[0]]}'?"
    return f"; allowed: {', '.join(siblings or Config.model_fields)}"


def validation_message(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """The first mistake in one line; `fields` are the known (dotted) keys with their pydantic fields."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and "[" in part))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_did_you_mean(key)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{message}{more}"
    field = fields.get(key) or fields.get(key.rpartition(".")[0])
    meaning = f" ({field.description})" if field is not None else ""
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}{meaning}{more}"
