"""Configs from YAML files and `key=value` overrides, with one-line errors; and the table of all keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from wml_ray.config.model import ModelConfig
from wml_ray.config.schema import Config, PruningConfig
from wml_ray.config.yaml_text import MAX_CHARACTERS, read_yaml
from wml_ray.errors import UserError, root_cause, shortened
from wml_ray.settings import Section
from wml_ray.storage.paths import is_remote, to_path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key=value` overrides.

    A config that names the user's own code as `package.module:name` adds the file's folder and the current directory
    to the end of the import path.

    Raises:
        UserError: no such file, an unknown protocol, not YAML, an unknown key, or a value outside its range.
    """
    name = shortened(path) if str(path).isprintable() else _quoted(str(path))
    file = to_path(path)
    try:
        with file.open(encoding="utf-8") as opened:
            raw = read_yaml(opened.read(MAX_CHARACTERS + 1))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"config file {name} is not valid YAML: {error}; see jobs/ for examples") from None
    except Exception as error:  # OSError, and any error of a remote storage's client
        raise UserError(f"config file {name}: {root_cause(error)}; give the path of a YAML file, see jobs/") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"config file {name} contains a {type(raw).__name__}, not keys such as `seed: 0`")
    config = parse_config(raw, overrides)
    if config.user_functions:
        folders = [Path.cwd()] if is_remote(file) else [Path(path).resolve().parent, Path.cwd()]
        sys.path.extend(str(folder) for folder in folders if str(folder) not in sys.path)
    return config


def parse_config(raw: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Validate nested settings, with `key=value` overrides applied to a copy. An empty section has its defaults.

    Raises:
        UserError: an unknown key, or a value outside its range.
    """
    try:
        merged = json.loads(json.dumps(raw, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"settings must be nested dicts with words as keys: {shortened(error)}") from None
    merged = {key: value for key, value in merged.items() if value is not None or key not in Config.model_fields}
    for override in overrides:
        _apply_override(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise UserError(validation_message(error, known_keys())) from None


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of the config with dotted keys set to `values`.

    Raises:
        UserError: an unknown key, or a value outside its range.
    """
    raw = config.model_dump(mode="json")
    for key, value in values.items():
        _set(raw, key, value)
    return parse_config(raw)


def as_config(config: str | Path | Mapping[str, Any] | Config, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config of a YAML file, of nested settings, or the one that is given, with `overrides` set.

    An override is a dotted key and its value, or a section and a mapping of its keys.

    Raises:
        UserError: as `load_config`.
    """
    if isinstance(config, (str, Path)):
        config = load_config(config)
    elif isinstance(config, Mapping):
        config = parse_config(dict(config))
    values: dict[str, Any] = {}
    for key, value in (overrides or {}).items():
        nested = value.items() if isinstance(value, Mapping) and "." not in key else None
        values |= {f"{key}.{inner}": each for inner, each in nested} if nested is not None else {key: value}
    return with_values(config, values) if values else config


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


def validation_message(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """The first error in one line. `fields` maps the known (dotted) keys to their pydantic fields."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and "[" in part))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {_quoted(key)}{_did_you_mean(key)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{message if not key or key in message else f'{key}: {message}'}{more}"
    field = fields.get(key) or fields.get(key.rpartition(".")[0])
    meaning = f" ({field.description})" if field is not None else ""
    value = shortened(repr(first["input"]))
    return f"{shortened(key)} = {value}: {message[0].lower()}{message[1:]}{meaning}{more}"


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {_quoted(override)} must have the form key=value, for example wml.alpha=0.3")
    try:
        value = read_yaml(text)
    except UserError as error:
        shown = f"{key}=..." if "@" in text else override  # the value may hold a password
        raise UserError(f"override {_quoted(shown)}: the value is not valid YAML: {error}") from None
    _set(raw, key, value)


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node: Any = raw
    for parent in parents:
        node = _child(node, parent, key)
    if isinstance(node, list):
        if last not in map(str, range(len(node))):
            raise UserError(f"unknown key {_quoted(key)}: the list has entries 0 to {len(node) - 1}")
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"unknown key {_quoted(key)}: {_quoted('.'.join(parents))} is a single value, not a section")


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, dict):
        if name not in node and name in Config.model_fields:
            node[name] = {}
        if name not in node and name == "ratios":
            node[name] = list(PruningConfig().ratios)
        if name not in node and name == "sharing":
            node[name] = list(ModelConfig().sharing)
        if name not in node and key.startswith("method.settings."):
            node[name] = {}
        if name in node:
            return node[name]
    raise UserError(f"unknown key {_quoted(key)}{_did_you_mean(key)}")


def _choices(field: Any) -> str:
    options = getattr(field.annotation, "__args__", ())
    if options and all(isinstance(option, str) for option in options):
        return " \\| ".join(f"`{option}`" for option in options) + ": "
    return ""


def _did_you_mean(key: str) -> str:
    section = key.split(".")[0]
    siblings = [known for known in known_keys() if known.startswith(f"{section}.")]
    if "." in key and not siblings:
        candidates, given = {known: known for known in known_keys()}, key
    else:  # several sections have an `alpha`: the first one is suggested
        last_to_first = reversed(siblings or [*known_keys()])
        candidates, given = {known.rpartition(".")[2]: known for known in last_to_first}, key.rpartition(".")[2]
    close = get_close_matches(given[:100], candidates, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{candidates[close[0]]}'?"
    return f"; allowed: {', '.join(siblings or Config.model_fields)}"


def _quoted(text: str) -> str:
    """The text in quotes on one line, shortened."""
    return shortened(repr(text))
