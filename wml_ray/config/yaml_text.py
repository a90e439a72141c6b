"""A YAML parser for input written by users: without duplicate keys, dates, aliases, tags and deep nesting."""

from __future__ import annotations

import unicodedata
from typing import Any

import yaml

from wml_ray.errors import UserError, one_line, shortened

MAX_DEPTH = 10  # of nested lists and mappings
MAX_CHARACTERS = 100_000


def read_yaml(text: str) -> Any:
    """Parse YAML of strings, numbers, lists and mappings; dates stay strings.

    Raises:
        UserError: not valid YAML, a key that is given twice or is not a word, an alias or a tag, a control character,
            more than ten levels or more than 100,000 characters. The message is the reason alone, with the key.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{shortened(error.problem or error.context, 400)}{line}") from None
    except yaml.YAMLError as error:
        raise UserError(one_line(error)) from None


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.path: list[str] = []  # of the node that is composed: keys and numbers of list entries

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        depth = len(self.path)
        if index is not None:  # None for the document and for keys
            self.path.append(str(getattr(index, "value", index)))
        event.path = ".".join(self.path)
        if isinstance(event, yaml.AliasEvent):  # a few lines of them can stand for gigabytes
            raise _error("aliases such as *name are not supported", event)
        if getattr(event, "tag", None):
            raise _error("tags such as !!int are not supported", event)
        if depth > MAX_DEPTH:
            raise _error(f"lists and mappings are nested deeper than {MAX_DEPTH} levels", event)
        node: Any = super().compose_node(parent, index)
        node.path = event.path
        del self.path[depth:]
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:  # such as one of 5,000 digits
            raise _error(f"not a valid number: {node.value}", node) from None

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
            raise _error(f"control character in {value!r}", node)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = set()
        for key, _ in node.value:
            name = shortened(repr(key.value), 100)
            if key.tag != "tag:yaml.org,2002:str":
                raise _error(f"key {name} must be a word such as seed", key)
            if key.value in keys:
                raise _error(f"key {name} is given twice", key)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _error(problem: str, at: Any) -> yaml.MarkedYAMLError:
    """The error of an event or a node, with its key."""
    key = f"{shortened(repr(at.path), 100)}: " if at.path else ""
    return yaml.MarkedYAMLError(problem=f"{key}{shortened(problem)}", problem_mark=at.start_mark)
