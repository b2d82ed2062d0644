"""The choice of an executor: made once, outside jit."""

import functools
import importlib
import logging
from types import ModuleType

from jsparse.errors import JsparseError

EXECUTORS: dict[str, str] = {
    "cuda": "jsparse.executors.cuda",
    "cann": "jsparse.executors.npu",
    "cpu": "jsparse.executors.cpu",
    "xla": "jsparse.executors.xla",
}
"""Module of every executor, in the order in which `auto` tries them. Each has `unavailable()`, `take_rows`, `linear`,
`linears`, `dense_ffn`, `sparse_ffn` and `attend`. One whose device is not JAX's (cann) has also `place`, which puts
weights there before a step takes them, and `DeviceLoop`, which runs the decode loop there."""


def select_executor(name: str = "auto") -> ModuleType:
    """The executor of that name, or for `auto` the first that can run here.

    Raises:
      JsparseError: no such executor, or it cannot run here; the message has its reason.
    """
    if name == "auto":
        return first_available()
    if name not in EXECUTORS:
        raise JsparseError(f"executor {name!r} does not exist; choose from auto, {', '.join(EXECUTORS)}")
    executor = importlib.import_module(EXECUTORS[name])
    if reason := executor.unavailable():
        raise JsparseError(f"executor {name!r} cannot run here: {reason}")
    return executor


@functools.cache
def first_available() -> ModuleType:
    """The executor that `auto` stands for. A line is logged, once: a warning if none of this device's own can run."""
    log = logging.getLogger("jsparse")
    reasons = []
    for name, module in EXECUTORS.items():
        executor = importlib.import_module(module)
        if reason := executor.unavailable():
            reasons.append(f"{name} cannot run here: {reason}")
            continue
        log.log(logging.WARNING if name == "xla" else logging.INFO, "executor: %s", "; ".join([name, *reasons]))
        return executor
    raise JsparseError(f"no executor can run here: {'; '.join(reasons)}")
