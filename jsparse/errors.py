"""The exception for mistakes in what the user gave, and how long lists are shown in its message."""

from collections.abc import Iterable


class JsparseError(ValueError):
    """Bad input: the message names the file, key, shape or option at fault and what to do. Commands print it as one
    sentence and exit with code 2."""


def listing(items: Iterable[str], most: int = 8, between: str = ", ") -> str:
    """The items in one line; past the first few only their number is given."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + more
