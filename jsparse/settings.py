"""JAX's global settings: the package computes under its own, whatever the caller's program has set for itself."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

_Function = TypeVar("_Function", bound=Callable)
_Item = TypeVar("_Item")


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """JAX's defaults where another value changes results or makes the package's own code fail.

    These are 64-bit mode, the promotion of ranks and dtypes, the transfer guard, the precision of products, the kind of
    random keys, and the checks for NaN and infinity, which masks and thresholds contain by design.
    """
    with contextlib.ExitStack() as stack:
        for setting in (
            jax.enable_x64(False),
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            jax.transfer_guard("allow"),
            jax.default_matmul_precision(None),
            jax.default_prng_impl("threefry2x32"),
            jax.threefry_partitionable(True),
            jax.debug_nans(False),
            jax.debug_infs(False),
            jax.debug_key_reuse(False),
        ):
            stack.enter_context(setting)
        yield


def with_own_settings(function: _Function) -> _Function:
    """A function of the public API, run under `own_settings`."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with own_settings():
            return function(*args, **kwargs)

    return run


def each_with_own_settings(items: Iterator[_Item]) -> Iterator[_Item]:
    """The items of an iterator, each computed under `own_settings`, which the caller's code between them is not."""
    while True:
        with own_settings():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
