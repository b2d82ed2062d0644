"""All that depends on how Pallas reaches the GPU: today the Triton lowering, on JAX 0.10 and 0.11.

A kernel body takes whole arrays as refs, reads them through `load` and writes them through `store`. Where a program is
lowered for CUDA the body becomes a Triton kernel; anywhere else Pallas interprets it, for tests.
"""

from collections.abc import Callable, Sequence

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

program_id = pl.program_id
when = pl.when


def call(
    body: Callable,
    *arrays: jax.Array,
    name: str,
    grid: tuple[int, ...],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    warps: int,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Run `body(*input_refs, *output_refs)` once for every index of the grid, in no order.

    Args:
      name: of the kernel, as profilers show it.
      out_shape: outputs, which hold garbage where the body stores nothing.
      warps: of 32 threads each, per program.
      aliases: from an input's index to that of the output which is the same memory.
    """

    body.__name__ = body.__qualname__ = name  # which JAX 0.11 gives the kernel, and 0.10 `name`

    def kernel(interpret: bool) -> Callable:
        # Without the Triton parameters JAX 0.10 would take the Mosaic GPU lowering, which has no vector-indexed loads.
        parameters = triton.CompilerParams(num_warps=warps, num_stages=1)
        return pl.pallas_call(
            body,
            name=name,
            grid=grid,
            out_shape=out_shape,
            input_output_aliases=aliases or {},
            interpret=interpret,
            compiler_params=parameters,
        )

    return list(jax.lax.platform_dependent(*arrays, cuda=kernel(False), default=kernel(True)))


def load(ref, *indices: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """ref[indices], the index arrays broadcast against each other; zero, and nothing is read, where mask is false."""
    return triton.load(ref.at[indices], mask=mask, other=None if mask is None else 0)


def store(ref, value: jax.Array, *indices: jax.Array) -> None:
    """ref[indices] = value. No two indices may be the same: interpreted, even a masked store loses one of them."""
    triton.store(ref.at[indices], value)
