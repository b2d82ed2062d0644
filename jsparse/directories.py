"""Files and directories: written as a whole or not at all, and read with a sentence where they cannot be."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsparse.errors import JsparseError

_POINTER = b"version https://git-lfs"
_PLAIN = re.compile(r"[\w ./+,=@~-]*")
"""What no library takes for a pattern, an address or a separator."""
_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Seconds before each attempt to remove a directory."""


@contextlib.contextmanager
def replacing_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its name when the block ends, or is removed if it fails.

    What has that name, or what a symbolic link of that name leads to, is removed only then. Files get the permissions
    that the umask leaves, whatever wrote them.

    Raises:
      JsparseError: an OSError, in the block too.
    """
    directory = Path(os.path.realpath(directory))
    partial = directory.with_name(f".jsparse-{uuid.uuid4().hex[:16]}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise JsparseError(f"{directory}: cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        _set_modes(partial)
        _swap(partial, directory)
    except OSError as error:
        raise JsparseError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        _remove(partial)


def _remove(directory: Path) -> None:
    """Delete a directory, if it exists. After an error threads of a storage library may still write into it for a
    moment, so that one attempt may leave something."""
    for pause in _PAUSES:
        time.sleep(pause)
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return


def _set_modes(directory: Path) -> None:
    """Give all that is below the permissions that the directory has by the umask."""
    mode = directory.stat().st_mode & 0o777
    for path in directory.rglob("*"):
        inherited = path.stat().st_mode & 0o7000
        path.chmod(inherited | (mode if path.is_dir() else mode & 0o666))


def _swap(new: Path, directory: Path) -> None:
    """Give `new` the name of `directory`; what was there is removed afterwards, or put back if that fails."""
    if not directory.exists():
        new.rename(directory)
        return
    old = new.with_name(f"{new.name}.old")
    directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    _remove(old)


def read_path(value: object, option: str = "the directory") -> Path:
    """A path as users give it: a string or a `Path`, with ~ for the home directory.

    Raises:
      JsparseError: it is of another type, or no path.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise JsparseError(f"{option} is {value!r}; it must be a path: a string or a pathlib.Path")
    try:
        if not os.fspath(value) or b"\0" in os.fsencode(value):
            raise JsparseError(f"{option} is {os.fspath(value)!r}, which is no path")
        return Path(value).expanduser()
    except UnicodeEncodeError:
        raise JsparseError(f"{option} is {os.fspath(value)!r}, which is no path") from None
    except RuntimeError as error:
        raise JsparseError(f"{value}: {error}") from None


@contextlib.contextmanager
def plain_path(directory: Path) -> Iterator[Path]:
    """A path of the directory that no library takes for anything else: itself, or a temporary symbolic link to it."""
    directory = Path(os.path.abspath(directory))
    if _PLAIN.fullmatch(str(directory)):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="jsparse-") as folder:
        link = Path(folder) / "directory"
        link.symlink_to(directory, target_is_directory=True)
        yield link


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      JsparseError: the file cannot be read, or holds something else.
    """
    check_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise JsparseError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise JsparseError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def check_readable(path: Path) -> None:
    """Raise JsparseError if a file cannot be read, or is what git-lfs leaves in place of one that it did not fetch."""
    try:
        with open(path, "rb") as file:
            begins = file.read(len(_POINTER))
    except OSError as error:
        raise JsparseError(f"{path} cannot be read: {error.strerror}") from None
    check_pointer(path, begins)


def check_pointer(path: Path, content: bytes) -> None:
    """Raise JsparseError if a file with this content is a pointer of git-lfs."""
    if content.startswith(_POINTER):
        raise JsparseError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository")
