"""Weights in 4 bits with a codebook and a float16 scale of every 32 columns of a row: their part in other kernels, and
the dense product of a few tokens with them."""

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import call, load, program_id, store

_BYTES = 16
"""Bytes of codes that share a scale."""
FEW = 8
"""Most tokens that `project` takes: it holds the sums of each in registers."""
_GROUPS = 32
"""Groups of a row that a program of `project` reads at once."""
_WARPS = 4


def dot(
    x_ref, tokens: list[jax.Array], matrix: list, rows: jax.Array, wanted: jax.Array, groups: int
) -> list[jax.Array]:
    """Multiply rows of a matrix with x of each token.

    Args:
      x_ref: (B, D).
      tokens: indices into it.
      matrix: the refs of values and codebook.
      rows, wanted: (R,), and which of them are read.
      groups: of each row that are read at once.

    Returns:
      The products (R,) of every token.
    """
    width = x_ref.shape[1]
    count = -(-width // 32)
    groups = min(groups, 1 << (count - 1).bit_length())
    sums = [0.0 for _ in tokens]
    for start in range(0, count, groups):
        whole = 32 * (start + groups) <= width
        even, odd, scale, cols = _read(matrix, rows, wanted, start * _BYTES, groups * _BYTES, width, whole)
        masks = (None, None) if whole else (cols < -(-width // 2), 2 * cols + 1 < width)
        for i, token in enumerate(tokens):
            x_even, x_odd = (load(x_ref, token, 2 * cols + side, mask=mask) for side, mask in enumerate(masks))
            sums[i] += jnp.sum(even * x_even[None] + odd * x_odd[None], axis=2) * scale
    return [jnp.sum(total, axis=1) for total in sums]


def times_rows(
    weight: jax.Array, matrix: list, rows: jax.Array, wanted: jax.Array, start: jax.Array, count: int, width: int
) -> list[jax.Array]:
    """Multiply each row (R,) of a matrix with its weight (R,), for `count` bytes of codes from `start` on.

    Returns the products (R, G, n) of the even and of the odd columns. Only wanted rows are read. `width` is the
    matrix's columns.
    """
    even, odd, scale, _ = _read(matrix, rows, wanted, start, count, width, whole=-(-width // 2) % count == 0)
    factor = (weight[:, None] * scale)[:, :, None]
    return [even * factor, odd * factor]


def columns(start: jax.Array | int, count: int) -> tuple[jax.Array, jax.Array]:
    """Indices of `count` bytes of codes from `start` on: the first byte of each group (G,), and all bytes (G, n).

    The count is a power of two, and the start a multiple of it.
    """
    per_group = min(count, _BYTES)
    first = start + jnp.arange(count // per_group) * per_group
    return first, first[:, None] + jnp.arange(per_group)[None]


def _read(
    matrix: list, rows: jax.Array, wanted: jax.Array, start: jax.Array | int, count: int, width: int, whole: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Read `count` bytes of codes from `start` on of the wanted rows (R,), and look them up.

    Returns the even and the odd columns (R, G, n) unscaled and the scales (R, G), in float32, and the bytes' indices
    (G, n). `whole` says that no byte lies behind the codes of a row.
    """
    values, codebook = matrix
    packed = -(-width // 2)
    first, cols = columns(start, count)
    mask, scale_mask = wanted[:, None, None], wanted[:, None]
    if not whole:
        mask, scale_mask = mask & (cols < packed)[None], scale_mask & (first < packed)[None]
    codes = load(values, rows[:, None, None], cols[None], mask=mask).astype(jnp.int32)
    scale = _scales(values, rows[:, None], packed + first[None] // _BYTES * 2, scale_mask)
    even, odd = (load(codebook, code).astype(jnp.float32) for code in (codes & 15, codes >> 4))
    return even, odd, scale, cols


def _scales(values, rows: jax.Array, at: jax.Array, mask: jax.Array) -> jax.Array:
    """Read the scales that begin at those bytes of those rows, in float32."""
    low, high = (load(values, rows, at + i, mask=mask).astype(jnp.uint16) for i in range(2))
    return jax.lax.bitcast_convert_type(low | high << 8, jnp.float16).astype(jnp.float32)


def project(x: jax.Array, matrix: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Multiply at most FEW tokens x (B, D) with the transpose of a matrix (out, D): (B, out) float32."""
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
