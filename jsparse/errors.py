"""The exception for mistakes in what the user gave; commands print it as one sentence and exit with code 2."""


class JsparseError(ValueError):
    """Bad input: the message names the file, key, shape or option at fault and what to do."""
