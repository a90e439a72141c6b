"""The errors that end a command with one line, and functions for the text of messages."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the user's input: one line with the key, the value, the allowed values and the correction."""


class Diverged(RuntimeError):
    """A loss, a parameter or a peer weight became non-finite; the message says which, where, and a remedy."""


def root_cause(error: BaseException) -> str:
    """The message of the first error in a chain as one line, such as "Connection refused"."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return one_line(getattr(error, "strerror", None) or error)


def one_line(text: object, limit: int = 200) -> str:
    """A text or an error as one line of at most `limit` characters; the type's name where it has no text."""
    return shortened(" ".join(str(text).split()) or type(text).__name__, limit)


def shortened(value: object, limit: int = 200) -> str:
    """A value as text of at most `limit` characters, for a message; a longer text ends in "…"."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def number_of(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is 1."""
    return f"{number} {noun}{'s' * (number != 1)}"
