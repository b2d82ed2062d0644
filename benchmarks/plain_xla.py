"""Dense decoding as one would write it in JAX: 16-bit operands, float32 sums.

What sparse decoding on a GPU is held against; it stands where an executor does, without a sparse FFN.
"""

import jax
import jax.numpy as jnp

from jsparse.attention import attend
from jsparse.quantization import Matrix, QuantizedRows, dequantize, take_rows

__all__ = ["attend", "dense_ffn", "linear", "linears", "take_rows"]


def linear(x: jax.Array, weight: Matrix) -> jax.Array:
    """x W^T in float32 for x (..., D) and W (out, D)."""
    weight = _plain(weight)
    return jnp.einsum("...d,od->...o", x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def linears(x: jax.Array, weights) -> tuple[jax.Array, ...]:
    return tuple(linear(x, weight) for weight in weights)


def dense_ffn(x: jax.Array, ffn, spec) -> jax.Array:
    hidden = spec.phi(linear(x, ffn.gate)) * spec.psi(linear(x, ffn.up))
    down_t = _plain(ffn.down_t)
    return jnp.matmul(hidden.astype(down_t.dtype), down_t, preferred_element_type=jnp.float32)


def _plain(matrix: Matrix) -> jax.Array:
    return dequantize(matrix).astype(jnp.bfloat16) if isinstance(matrix, QuantizedRows) else matrix
