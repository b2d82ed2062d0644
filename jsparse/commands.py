"""What every command shares: its way to end on a user's mistake."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax

from jsparse.errors import JsparseError


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(message, 2))


def run_command(command: Callable[[], None]) -> None:
    """Run a command. A user's mistake is one sentence on stderr and exit code 2; Ctrl-C is exit code 130."""
    _keep_compiled_programs()
    try:
        command()
    except JsparseError as error:
        sys.exit(_fail(str(error), 2))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(f"{where}{error.strerror or error}", 2))
    except (RuntimeError, AssertionError):
        if reason := _missing_device():
            sys.exit(_fail(reason, 2))
        raise
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _missing_device() -> str | None:
    """What JAX says in a traceback at the first computation, where it has no device at all."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error) or "is the plugin for it installed?"
        return f"JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms}: {reason}"
    return None


def _keep_compiled_programs() -> None:
    """Compile a model's decode step once, not at every command. JAX_COMPILATION_CACHE_DIR names another place."""
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        cache = (chosen if chosen.is_absolute() else Path.home() / ".cache") / "jsparse"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return  # a home that cannot be written costs the time to compile
    jax.config.update("jax_compilation_cache_dir", str(cache))


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
