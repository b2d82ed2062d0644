"""What every command shares: how it names a model, and how it ends on a user's mistake."""

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax

from jsparse.arrays import DTYPES
from jsparse.errors import JsparseError
from jsparse.model.ffn import HF_KINDS


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(message, 2))


def add_model(command: argparse.ArgumentParser) -> None:
    """The arguments that name a model and say how to read it."""
    command.add_argument("model", help="jsparse directory, Hugging Face checkpoint, or 'default'")
    command.add_argument("--dtype", choices=DTYPES, help="of the weight matrices (default: as stored)")
    command.add_argument("--ffn", choices=HF_KINDS, help="FFN kind of a HF checkpoint")


def check_output() -> None:
    """Raises: JsparseError: standard output is closed."""
    if sys.stdout is None:
        raise JsparseError("standard output is closed, and there the answer goes")


def run_command(command: Callable[[], None]) -> None:
    """Run a command. A user's mistake is one sentence on stderr and exit code 2; Ctrl-C is exit code 130."""
    _print_any_text()
    _keep_compiled_programs()
    try:
        command()
    except JsparseError as error:
        sys.exit(_fail(str(error), 2))
    except BrokenPipeError:  # what reads the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(f"{where}{error.strerror or error}", 2))
    except (RuntimeError, AssertionError):
        if reason := _missing_device():
            sys.exit(_fail(reason, 2))
        raise
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _print_any_text() -> None:
    """Print characters that the terminal's encoding lacks as escapes, not as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
    # A disk that is full by then costs the time to compile again, which is no news to a user.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    named = jax.config.jax_compilation_cache_dir
    try:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        cache = Path(named or (chosen if chosen.is_absolute() else Path.home() / ".cache") / "jsparse")
        if "://" not in str(named):  # JAX also takes the address of a bucket
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
    except (OSError, RuntimeError) as error:  # a place that cannot be written costs the time to compile
        jax.config.update("jax_compilation_cache_dir", None)
        if named:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"compiled programs are not kept: JAX_COMPILATION_CACHE_DIR is {named}: {reason}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", named or str(cache))


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # a full or closed stderr changes nothing of the exit code
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code
