"""Errors that people read, and how an exception becomes one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: one line with the key, the value, what is allowed and the mend."""


class Diverged(RuntimeError):
    """A loss, a parameter or a peer weight turned non-finite; the message says which, where and what helps."""


def root_cause(error: BaseException) -> str:
    """The first cause in one short line: "Connection refused" rather than what four layers made of it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:200]
