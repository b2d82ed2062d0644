"""Dense decoding as one would write it in JAX: 16-bit operands, float32 sums.

What sparse decoding on a GPU is held against; it stands where an executor does, without a sparse FFN.
"""

import jax
import jax.numpy as jnp

from jsparse.arrays import Matrix, QuantizedRows, take_rows
from jsparse.model.attention import attend

__all__ = ["attend", "dense_ffn", "linear", "linears", "take_rows"]


def linear(x: jax.Array, weight: Matrix) -> jax.Array:
    """x W^T in float32 for x (..., D) and W (out, D); of int8 rows the sums are scaled, so that W is never widened."""
    values, scale = _stored(weight)
    return jnp.einsum("...d,od->...o", x.astype(values.dtype), values, preferred_element_type=jnp.float32) * scale


def linears(x: jax.Array, weights) -> tuple[jax.Array, ...]:
    return tuple(linear(x, weight) for weight in weights)


def dense_ffn(x: jax.Array, ffn, spec) -> jax.Array:
    hidden = spec.phi(linear(x, ffn.gate)) * spec.psi(linear(x, ffn.up))
    values, scale = _stored(ffn.down_t)
    return jnp.matmul((hidden * scale).astype(values.dtype), values, preferred_element_type=jnp.float32)


def _stored(matrix: Matrix) -> tuple[jax.Array, jax.Array | float]:
    if isinstance(matrix, QuantizedRows):
        return matrix.values.astype(jnp.bfloat16), matrix.scale
    return matrix, 1.0
