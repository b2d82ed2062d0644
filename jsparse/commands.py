"""What every command shares: its way to end on a user's mistake, and the printing of calibration reports."""

import sys
from collections.abc import Callable

from jsparse.errors import JsparseError


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
    print(f"error: {message}", file=sys.stderr)
    return code
