"""Dense decoding as one would write it in JAX: 16-bit operands, float32 sums.

What sparse decoding on a GPU is held against; it decodes densely only.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jsparse.arrays import Matrix, Rows
from jsparse.executors.xla import Xla, activate, activate_up
from jsparse.model.executor import Split
from jsparse.model.ffn import FFNSpec
from jsparse.model.weights import FFNWeights, Linear


@dataclasses.dataclass(frozen=True)
class PlainXla(Xla):
    """XLA's executor with products in 16 bits. Of int8 rows the sums are scaled, so that none is ever widened."""

    name: str = "plain xla"

    def project(self, x: jax.Array, linears: Sequence[Linear], split: Split = "out") -> tuple[jax.Array, ...]:
        """As `Executor.project`."""
        outs = (_linear(x, linear.rows) for linear in linears)
        return tuple(out if linear.bias is None else out + linear.bias for out, linear in zip(outs, linears))

    def dense_ffn(self, x: jax.Array, ffn: FFNWeights, spec: FFNSpec) -> jax.Array:
        """As `Executor.dense_ffn`."""
        hidden = activate(spec, _linear(x, ffn.gate), ffn.threshold)
        if ffn.up is not None:
            hidden = hidden * activate_up(spec, _linear(x, ffn.up))
        values, scale = _stored(ffn.down_t)
        return jnp.matmul((hidden * scale).astype(values.dtype), values, preferred_element_type=jnp.float32)


def _linear(x: jax.Array, weight: Matrix) -> jax.Array:
    values, scale = _stored(weight)
    return jnp.einsum("...d,od->...o", x.astype(values.dtype), values, preferred_element_type=jnp.float32) * scale


def _stored(matrix: Matrix) -> tuple[jax.Array, jax.Array | float]:
    if isinstance(matrix, Rows):
        return matrix.values.astype(jnp.bfloat16), matrix.scale[:, 0]
    return matrix, 1.0
