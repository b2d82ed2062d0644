"""The exception for mistakes in what the user gave; commands print it as one sentence and exit with code 2."""

from collections.abc import Sequence


class JsparseError(ValueError):
    """Bad input: the message names the file, key, shape or option at fault and what to do."""


def some_of(items: Sequence[str], most: int = 5, between: str = "; ") -> str:
    """The first few items as text, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + more
