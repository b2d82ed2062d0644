"""Checks of what users pass from Python, shared by the functions of the public API."""

import numbers
from typing import Any

import numpy as np

from jsparse.errors import JsparseError


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def read_number(name: str, value: Any) -> float:
    """A number as Python's own. Raises: JsparseError: it is none."""
    if not is_number(value):
        raise JsparseError(f"{name} is {value!r}, which is no number")
    try:
        return float(value)
    except OverflowError:
        raise JsparseError(f"{name} is a number of {len(str(value))} digits, which is too large") from None


def read_whole(name: str, value: Any) -> int:
    """A whole number as Python's own. Raises: JsparseError: it is none."""
    if not is_whole(value):
        raise JsparseError(f"{name} is {value!r}; it must be a whole number")
    return int(value)


def check_flag(name: str, value: Any, *, optional: bool = False) -> None:
    """Raises: JsparseError: an option is not True or False (or None, where it is optional)."""
    if not (isinstance(value, bool | np.bool_) or (optional and value is None)):
        choices = "True, False or None" if optional else "True or False"
        raise JsparseError(f"{name} is {value!r}; it must be {choices}")


def check_callback(name: str, value: Any) -> None:
    """Raises: JsparseError: a callback is neither None nor callable."""
    if value is not None and not callable(value):
        raise JsparseError(f"{name} is {value!r}; it must be a function or None")
