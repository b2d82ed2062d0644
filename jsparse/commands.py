"""What every command shares: its way to end on a user's mistake."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from jsparse.errors import JsparseError


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(message, 2))


def run_command(command: Callable[[], None]) -> None:
    """Run a command. A user's mistake is one sentence on stderr and exit code 2; Ctrl-C is exit code 130."""
    try:
        command()
    except JsparseError as error:
        sys.exit(_fail(str(error), 2))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(f"{where}{error.strerror or error}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
