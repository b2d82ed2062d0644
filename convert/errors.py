"""The exception for a checkpoint or predictor file that cannot be converted."""

from jsparse.errors import JsparseError


class ConversionError(JsparseError):
    """A checkpoint cannot be read, understood or written; the message names the file and every problem of a kind."""
