"""Norms of the residual stream."""

import jax
import jax.numpy as jnp

from jsparse.typing import Array, Float


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x over its root mean square, in float32, times the scale."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)
