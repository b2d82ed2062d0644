"""The exception for a checkpoint or predictor file that cannot be converted, and how long lists are shown in it."""

from collections.abc import Iterable

from jsparse.errors import JsparseError

_SHOWN = 8


class ConversionError(JsparseError):
    """A checkpoint cannot be read, understood or written; the message names the file and every problem of a kind."""


def listing(items: Iterable[str]) -> str:
    """The items joined by commas; past the first few only their number is given."""
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
