"""Files around a checkpoint: JSON in, and whole directories out at once or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from convert.errors import ConversionError
from jsparse import directories
from jsparse.errors import JsparseError


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
      ConversionError: the file is missing, unreadable, or holds something else.
    """
    check_file(path)
    with _as_conversion_error():
        return directories.read_json(path)


def check_file(path: Path) -> None:
    """Raise ConversionError if a file is missing, unreadable, or a git-lfs pointer to what it should be."""
    if not os.path.lexists(path):
        raise ConversionError(f"{path} does not exist")
    with _as_conversion_error():
        directories.check_readable(path)


@contextlib.contextmanager
def _as_conversion_error() -> Iterator[None]:
    try:
        yield
    except JsparseError as error:
        raise ConversionError(str(error)) from None


def check_destination(destination: Path) -> None:
    """Raise ConversionError if something is there already."""
    if os.path.lexists(destination):
        raise ConversionError(f"{destination} already exists; choose another name or remove it")


def check_writable(destination: Path) -> None:
    """Raise ConversionError unless the nearest existing folder above the destination is a writable directory."""
    parent = next(folder for folder in destination.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ConversionError(f"{destination} cannot be made: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConversionError(f"{destination} cannot be made: {parent} is not writable")


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A temporary sibling to write into, renamed to the destination on success and removed on any failure.

    Raises:
      ConversionError: something is at the destination already.
      JsparseError: writing fails.
    """
    check_destination(destination)
    with directories.replacing_directory(destination) as partial:
        yield partial
