"""Weights in 4 bits with a codebook and a float16 scale of every 32 columns of a row: their part in other kernels, and
the dense product of a few tokens with them."""

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import call, load, program_id, store

_BYTES = 16
"""Of the codes that share a scale."""
FEW = 8
"""Most tokens that `project` takes; for each it holds sums in registers."""
_GROUPS, _WARPS = 32, 4
"""Of a row, a program of `project` reads so many groups at a time."""


def dot(
    x_ref, tokens: list[jax.Array], matrix: list, rows: jax.Array, wanted: jax.Array, groups: int
) -> list[jax.Array]:
    """Some rows (R,) of a matrix times x of each token, one (R,) for each; only wanted rows are read, so many groups
    of each at a time."""
    values, codebook = matrix
    width = x_ref.shape[1]
    packed, count = -(-width // 2), -(-width // 32)
    groups = min(groups, 1 << (count - 1).bit_length())
    sums = [0.0 for _ in tokens]
    for start in range(0, count, groups):
        first, cols = columns(start * _BYTES, groups * _BYTES)
        inside = None if 32 * (start + groups) <= width else cols < packed
        mask, scale_mask = wanted[:, None, None], wanted[:, None]
        if inside is not None:
            mask, scale_mask = mask & inside[None], scale_mask & (first < packed)[None]
        codes = load(values, rows[:, None, None], cols[None], mask=mask).astype(jnp.int32)
        scale = scales(values, rows[:, None], packed + first[None] // _BYTES * 2, scale_mask)
        even, odd = (load(codebook, code).astype(jnp.float32) for code in (codes & 15, codes >> 4))
        for i, token in enumerate(tokens):
            x_even = load(x_ref, token, 2 * cols, mask=inside)
            x_odd = load(x_ref, token, 2 * cols + 1, mask=None if inside is None else 2 * cols + 1 < width)
            sums[i] += jnp.sum(even * x_even[None] + odd * x_odd[None], axis=2) * scale
    return [jnp.sum(total, axis=1) for total in sums]


def columns(start: jax.Array | int, count: int) -> tuple[jax.Array, jax.Array]:
    """So many bytes of a row, a power of two, from a multiple of it on: the first of each group (G,) and all (G, n)."""
    per_group = min(count, _BYTES)
    first = start + jnp.arange(count // per_group) * per_group
    return first, first[:, None] + jnp.arange(per_group)[None]


def times_rows(
    weight: jax.Array, matrix: list, rows: jax.Array, wanted: jax.Array, start: jax.Array, count: int, width: int
) -> list[jax.Array]:
    """weight (R,) times the even and the odd columns (R, G, n) in so many bytes of some rows (R,) of a matrix with so
    many columns; only wanted rows are read."""
    values, codebook = matrix
    packed = -(-width // 2)
    first, cols = columns(start, count)
    mask, scale_mask = wanted[:, None, None], wanted[:, None]
    if packed % count:
        mask, scale_mask = mask & (cols < packed)[None], scale_mask & (first < packed)[None]
    codes = load(values, rows[:, None, None], cols[None], mask=mask).astype(jnp.int32)
    factor = weight[:, None] * scales(values, rows[:, None], packed + first[None] // _BYTES * 2, scale_mask)
    return [load(codebook, code).astype(jnp.float32) * factor[:, :, None] for code in (codes & 15, codes >> 4)]


def scales(values, rows: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
    """The scales in float32 that begin at those bytes of those rows."""
    low, high = (load(values, rows, at + i, mask=mask).astype(jnp.uint16) for i in range(2))
    return jax.lax.bitcast_convert_type(low | high << 8, jnp.float16).astype(jnp.float32)


def project(x: jax.Array, matrix: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x (B, D) times the transpose of a matrix (out, D), (B, out) float32, for at most FEW tokens."""
    batch, num_rows = len(x), len(matrix[0])
    size = 8 if batch == 1 else 4  # rows of a program, which hold sums of every token in registers
    programs = -(-num_rows // size)

    def body(x_ref, values_ref, codebook_ref, out_ref):
        rows = program_id(0) * size + jnp.arange(size)
        tokens = [jnp.int32(i) for i in range(batch)]
        for token, sums in zip(tokens, dot(x_ref, tokens, [values_ref, codebook_ref], rows, rows < num_rows, _GROUPS)):
            store(out_ref, sums, token, rows)

    (out,) = call(
        body,
        x.astype(jnp.float32),
        *matrix,
        name="project",
        grid=(programs,),
        out_shape=[jax.ShapeDtypeStruct((batch, programs * size), jnp.float32)],
        warps=_WARPS,
    )
    return out[:, :num_rows]
