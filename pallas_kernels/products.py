"""Dense products: float32 activations times weights that are never widened in memory, but for those with a codebook
where there are many tokens. Products of a few tokens with these are kernels, all others are XLA's."""

import jax
import jax.numpy as jnp

from pallas_kernels import grouped, kernels
from pallas_kernels.kernels import Matrix, is_grouped, nibbles
from pallas_kernels.tiles import choose

_HIGHEST = jax.lax.Precision.HIGHEST


def linear(x: jax.Array, weight: Matrix) -> jax.Array:
    """x (B, D) times the transpose of weight (out, D), (B, out) float32.

    One token is one fused pass over the weights in float32. More tokens go to the matrix units, which take 16-bit
    operands: x is the sum of a few 16-bit parts, so that the product is a float32 one all the same.
    """
    if is_grouped(weight):
        if len(x) <= grouped.FEW:
            return grouped.project(x, weight)
        weight = widened(weight, x.shape[1])
    values, scale = weight if isinstance(weight, tuple) else (weight, None)
    if x.shape[0] == 1:
        return _one_token(x, values, scale)
    out = _tokens(x, values)
    return out if scale is None else out * scale[:, 0]


def take_rows(matrix: Matrix, indices: jax.Array, columns: int) -> jax.Array:
    """Rows of a matrix (rows, columns) in float32; an index past the end gives zeros."""
    if is_grouped(matrix):
        return widened((matrix[0].at[indices].get(mode="fill", fill_value=0), matrix[1]), columns)
    values, scale = (
        None if part is None else part.at[indices].get(mode="fill", fill_value=0)
        for part in (matrix if isinstance(matrix, tuple) else (matrix, None))
    )
    if values.dtype == jnp.uint8:
        values = jnp.stack(nibbles(values), axis=-1).reshape(values.shape[0], -1)[:, :columns]
    values = values.astype(jnp.float32)
    return values if scale is None else values * scale


def widened(matrix: tuple[jax.Array, jax.Array], columns: int) -> jax.Array:
    """A matrix with a codebook in float32."""
    values, codebook = matrix
    packed = -(-columns // 2)
    codes = jnp.stack([values[:, :packed] & 15, values[:, :packed] >> 4], axis=-1).reshape(values.shape[0], -1)
    pairs = values[:, packed:].reshape(values.shape[0], -1, 2)
    scale = jax.lax.bitcast_convert_type(pairs, jnp.float16).astype(jnp.float32)
    return codebook.astype(jnp.float32)[codes[:, :columns]] * jnp.repeat(scale, 32, axis=1)[:, :columns]


def transposed(h: jax.Array, weight: Matrix, columns: int) -> jax.Array:
    """h (B, F) times weight (F, columns), (B, columns) float32."""
    if is_grouped(weight):
        if len(h) <= grouped.FEW:
            return _all_down(h, weight, columns)
        weight = widened(weight, columns)
    values, scale = weight if isinstance(weight, tuple) else (weight, None)
    h = h if scale is None else h * scale[:, 0]
    if values.dtype == jnp.uint8:
        columns = [_split_product(h, part.astype(jnp.int8), 0) for part in nibbles(values)]
        return jnp.stack(columns, axis=-1).reshape(h.shape[0], -1)
    return _split_product(h, values, 0)


def _all_down(h: jax.Array, weight: Matrix, columns: int) -> jax.Array:
    """Compute `transposed` with the sparse FFN's kernel, which is told that all neurons have survived."""
    batch, num_neurons = h.shape
    tiles = choose(num_neurons, columns, "uint8")
    blocks = -(-num_neurons // tiles.neurons)
    neurons = jnp.arange(blocks * tiles.neurons, dtype=jnp.int32).reshape(blocks, tiles.neurons)
    kept = jnp.clip(num_neurons - tiles.neurons * jnp.arange(blocks, dtype=jnp.int32), max=tiles.neurons)
    hidden = jnp.pad(h, ((0, 0), (0, neurons.size - num_neurons))).reshape(batch, *neurons.shape)
    survivors = jnp.broadcast_to(neurons, hidden.shape)
    counts = jnp.broadcast_to(jnp.stack([kept, kept], axis=1), (batch, blocks, 2))
    return jnp.sum(kernels.down(survivors, hidden, counts, weight, columns, tiles=tiles)[0], axis=1)


def _one_token(x: jax.Array, values: jax.Array, scale: jax.Array | None) -> jax.Array:
    if values.dtype == jnp.uint8:
        products = sum(part.astype(jnp.float32) * side for part, side in zip(nibbles(values), _pair(x)))
    else:
        products = values.astype(jnp.float32) * x
    # Scaled before they are summed: XLA would give the sums' scaling a kernel of its own.
    return jnp.sum(products if scale is None else products * scale, axis=1)[None]


def _tokens(x: jax.Array, values: jax.Array) -> jax.Array:
    if values.dtype == jnp.uint8:
        return sum(_split_product(side, part.astype(jnp.int8), 1) for part, side in zip(nibbles(values), _pair(x)))
    return _split_product(x, values, 1)


def _split_product(x: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    """x contracted with that axis of values, at the precision of float32."""
    dimensions = (((1,), (axis,)), ((), ()))
    if values.dtype == jnp.float32:
        return jax.lax.dot_general(x, values, dimensions, precision=_HIGHEST)
    if values.dtype == jnp.int8:
        values = values.astype(jnp.bfloat16)  # exact, and fused into the product
    is_half = values.dtype == jnp.float16
    # float16 has few exponents: the parts are taken relative to each token's largest value, and each magnified.
    size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0) if is_half else jnp.ones((1, 1))
    largest = jnp.max(size, axis=1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1)
    count, step = (2, 2048.0) if is_half else (3, 1.0)
    parts = _parts(x / scale, values.dtype, count, step)
    out = jax.lax.dot_general(parts, values, dimensions, preferred_element_type=jnp.float32)
    out = out.reshape(count, x.shape[0], -1)
    return sum(out[i] * step**-i for i in range(count)) * scale


def _parts(x: jax.Array, dtype, count: int, step: float) -> jax.Array:
    """16-bit values (count * B, D) of which part i times step^-i add up to x (B, D)."""
    info = jnp.finfo(dtype)
    parts = []
    for _ in range(count):
        # Not a cast and back, which XLA takes for nothing.
        parts.append(jax.lax.reduce_precision(x, info.nexp, info.nmant))
        x = jnp.where(jnp.isfinite(x), x - parts[-1], 0) * step  # an infinity is all in its first part
    return jnp.concatenate(parts).astype(dtype)


def _pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Even and odd columns, the shorter one padded with zeros: what the two of `nibbles` are multiplied with."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2)))
    return x[:, 0::2], x[:, 1::2]
