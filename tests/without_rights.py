"""Child processes that file permissions bind, which they do not where tests run as root."""

import ctypes
import subprocess
import sys

_DROP_FROM_BOUNDING_SET = 24
_OVERRIDE_PERMISSIONS, _READ_ANYTHING = 1, 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of Linux."""


def _drop_rights() -> None:
    """Give up what lets root read and write everything; a program that is started afterwards does not have it."""
    library = ctypes.CDLL(None, use_errno=True)
    for capability in (_OVERRIDE_PERMISSIONS, _READ_ANYTHING):
        if library.prctl(_DROP_FROM_BOUNDING_SET, capability, 0, 0, 0) and ctypes.get_errno() != 1:
            raise OSError(ctypes.get_errno(), "prctl")


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    """Run Python with these arguments; output is captured as text."""
    return subprocess.run(
        [sys.executable, *command], preexec_fn=_drop_rights, capture_output=True, text=True, **options
    )
