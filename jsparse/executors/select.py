"""The choice of an executor: made once, outside jit."""

import functools
import logging
from collections.abc import Callable

import jax

from jsparse.errors import JsparseError
from jsparse.executors.kernels import KernelExecutor
from jsparse.executors.npu import Npu
from jsparse.executors.xla import Xla
from jsparse.model.executor import Executor


def _cpu_unavailable() -> str | None:
    import cpu_kernels

    return cpu_kernels.unavailable()


def _cuda_unavailable() -> str | None:
    import pallas_kernels

    return pallas_kernels.unavailable()


def _cann_unavailable() -> str | None:
    import cann_bridge

    if jax.default_backend() != "cpu":
        return f"arrays cross to the NPU from a CPU, and JAX computes on {jax.default_backend()}; set JAX_PLATFORMS=cpu"
    return cann_bridge.unavailable()


_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "cuda": _cuda_unavailable,
    "cann": _cann_unavailable,
    "cpu": _cpu_unavailable,
    "xla": lambda: None,
}
EXECUTORS = tuple(_UNAVAILABLE)
"""The names of all executors, in the order in which `auto` tries them."""


def unavailable(name: str) -> str | None:
    """Why the executor of that name cannot run here, or None."""
    return _UNAVAILABLE[name]()


def make_executor(name: str) -> Executor:
    """The executor of that name, whether or not it can run here."""
    if name == "cann":
        return Npu(host=KernelExecutor("cpu") if unavailable("cpu") is None else Xla())
    return Xla() if name == "xla" else KernelExecutor(name)


def select_executor(choice: str | Executor = "auto") -> Executor:
    """The executor of that name, for `auto` the first that can run here, or the one that is given.

    Raises:
      JsparseError: no such executor, or it cannot run here; the message has its reason.
    """
    if not isinstance(choice, str):
        return choice
    if choice == "auto":
        return first_available()
    if choice not in EXECUTORS:
        raise JsparseError(f"executor {choice!r} does not exist; choose from auto, {', '.join(EXECUTORS)}")
    if reason := unavailable(choice):
        raise JsparseError(f"executor {choice!r} cannot run here: {reason}")
    return make_executor(choice)


@functools.cache
def first_available() -> Executor:
    """The executor that `auto` stands for. A line is logged, once: a warning if none of this device's own can run."""
    log = logging.getLogger("jsparse")
    reasons = []
    for name in EXECUTORS:
        if reason := unavailable(name):
            reasons.append(f"{name} cannot run here: {reason}")
            continue
        log.log(logging.WARNING if name == "xla" else logging.INFO, "executor: %s", "; ".join([name, *reasons]))
        return make_executor(name)
    raise AssertionError("xla runs everywhere")
