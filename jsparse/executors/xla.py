"""The XLA executor: the reference that every other one is compared with, and the fallback that runs anywhere."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jsparse.arrays import Matrix, dequantize, take_rows
from jsparse.model.attention import attend
from jsparse.model.cache import LayerCache
from jsparse.model.executor import Executor, Split
from jsparse.model.ffn import FFNSpec
from jsparse.model.weights import FFNWeights, Linear, Predictor
from jsparse.typing import Array, Bool, Float, Int

_BLOCK = 128
"""Rows gathered per step of the loops over active neurons."""
_PRECISION = jax.lax.Precision.HIGHEST
"""float32 products are float32: by default XLA takes fewer bits on accelerators."""
_dot = partial(jnp.dot, precision=_PRECISION)


def linear(x: Float[Array, "... D"], weight: Matrix) -> Float[Array, "... out"]:
    """x W^T in float32, W (out, D)."""
    return jnp.einsum("...d,od->...o", x.astype(jnp.float32), dequantize(weight), precision=_PRECISION)


_ACTIVATIONS = {
    "relu": lambda gate, threshold: jnp.where(gate > threshold, gate, 0),
    "relu2": lambda gate, threshold: jnp.where(gate > threshold, gate * gate, 0),
    "silu": lambda gate, threshold: jax.nn.silu(gate),
}
_UP = {"linear": lambda up: up, "relu": jax.nn.relu}


def activate(spec: FFNSpec, gate: Float[Array, "..."], threshold: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply phi to gate values; a threshold belongs to each."""
    return _ACTIVATIONS[spec.activation](gate, threshold)


def activate_up(spec: FFNSpec, up: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply psi to up values."""
    return _UP[spec.up](up)


@dataclasses.dataclass(frozen=True)
class Xla(Executor):
    """Plain JAX on whatever device JAX has."""

    name: str = "xla"

    def rows(self, matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
        """As `Executor.rows`."""
        return take_rows(matrix, indices)

    def project(
        self, x: Float[Array, "... D"], linears: Sequence[Linear], split: Split = "out"
    ) -> tuple[Float[Array, "... out"], ...]:
        """As `Executor.project`."""
        outs = (linear(x, each.rows) for each in linears)
        return tuple(out if each.bias is None else out + each.bias for out, each in zip(outs, linears))

    def dense_ffn(self, x: Float[Array, "... D"], ffn: FFNWeights, spec: FFNSpec) -> Float[Array, "... D"]:
        """As `Executor.dense_ffn`."""
        hidden = activate(spec, linear(x, ffn.gate), ffn.threshold)
        if ffn.up is not None:
            hidden = hidden * activate_up(spec, linear(x, ffn.up))
        return jnp.matmul(hidden, dequantize(ffn.down_t), precision=_PRECISION)

    def sparse_ffn(
        self,
        x: Float[Array, "B D"],
        ffn: FFNWeights,
        predictor: Predictor,
        spec: FFNSpec,
        route: Float[Array, "B E"] | None = None,
    ) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
        """As `Executor.sparse_ffn`."""
        predicted = linear(linear(x, predictor.a), predictor.b) + predictor.bias > 0
        route = jnp.ones((x.shape[0], 1)) if route is None else route
        factors = jnp.repeat(route, predicted.shape[1] // route.shape[1], axis=1)
        tokens = (x.astype(jnp.float32), predicted & (factors != 0), factors)
        return jax.lax.map(lambda token: _sparse_token(*token, ffn, spec), tokens)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        count: Int[Array, "B"],
        cache: LayerCache,
        window: int | None,
    ) -> tuple[Float[Array, "B T N H"], LayerCache]:
        """As `Executor.attend`."""
        return attend(q, k, v, start, count, cache, window)


def _sparse_token(
    x: Float[Array, "D"], predicted: Bool[Array, "F"], factors: Float[Array, "F"], ffn: FFNWeights, spec: FFNSpec
) -> tuple[Float[Array, "D"], Int[Array, "2"]]:
    def gate_step(rows, hidden):
        threshold = ffn.threshold.at[rows].get(mode="fill", fill_value=0)
        values = activate(spec, _dot(take_rows(ffn.gate, rows), x), threshold)
        values = values * factors.at[rows].get(mode="fill", fill_value=0)
        if ffn.up is not None and spec.pipeline == "parallel":
            values = values * activate_up(spec, _dot(take_rows(ffn.up, rows), x))
        return hidden.at[rows].set(values, mode="drop")

    def up_step(rows, hidden):
        return hidden.at[rows].multiply(activate_up(spec, _dot(take_rows(ffn.up, rows), x)), mode="drop")

    hidden = _over_rows(predicted, gate_step, jnp.zeros(predicted.shape))
    if ffn.up is not None and spec.pipeline == "sequential":
        hidden = _over_rows(hidden != 0, up_step, hidden)

    def down_step(rows, y):
        return y + _dot(hidden.at[rows].get(mode="fill", fill_value=0), take_rows(ffn.down_t, rows))

    y = _over_rows(hidden != 0, down_step, jnp.zeros(x.shape))
    return y, jnp.stack([jnp.sum(predicted), jnp.sum(hidden != 0)]).astype(jnp.int32)


def _over_rows(flags: Bool[Array, "F"], body: Callable, init: Array) -> Array:
    """Fold `body(rows, carry)` over the flagged rows, a block at a time; the last block is padded with row F."""
    # A prefix sum and a scatter: less than half the time of jnp.nonzero on a CPU.
    size = flags.size
    place = jnp.where(flags, jnp.cumsum(flags, dtype=jnp.int32) - 1, size + _BLOCK)
    padded = jnp.full(size + -size % _BLOCK, size, jnp.int32)
    index = padded.at[place].set(jnp.arange(size, dtype=jnp.int32), mode="drop")

    def step(block, carry):
        return body(jax.lax.dynamic_slice_in_dim(index, block * _BLOCK, _BLOCK), carry)

    return jax.lax.fori_loop(0, (jnp.sum(flags) + _BLOCK - 1) // _BLOCK, step, init)
