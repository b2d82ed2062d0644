"""The executors of the kernel packages, which know arrays only and have the same functions of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jsparse.arrays import Matrix, Rows
from jsparse.model.attention import attend
from jsparse.model.cache import LayerCache, quantize_heads
from jsparse.model.executor import Executor, Split
from jsparse.model.ffn import FFNSpec
from jsparse.model.norm import rms_norm
from jsparse.model.weights import FFNWeights, Linear, Predictor, Weights
from jsparse.typing import Array, Float, Int

Operand = Array | tuple[Array, Array]
"""A matrix as an array, or as low-bit values and their scales or, where these lie in the rows, their codebook."""


def operand(matrix: Matrix) -> Operand:
    if not isinstance(matrix, Rows):
        return matrix
    return matrix.values, matrix.scale if matrix.codebook is None else matrix.codebook


def with_float_codebooks(tree: Any) -> Any:
    """The weights with every codebook in float32, where the CUDA kernels then have no conversion to do."""

    def widened(leaf):
        if not isinstance(leaf, Rows) or leaf.codebook is None:
            return leaf
        return dataclasses.replace(leaf, codebook=leaf.codebook.astype(jnp.float32))

    return jax.tree.map(widened, tree, is_leaf=lambda leaf: isinstance(leaf, Rows))


def operands(ffn: FFNWeights) -> list[Operand | None]:
    """Gate, up, down_t and threshold."""
    up = None if ffn.up is None else operand(ffn.up)
    return [operand(ffn.gate), up, operand(ffn.down_t), ffn.threshold]


def activations(spec: FFNSpec) -> dict[str, str]:
    """The names by which the packages know what an FFN applies to its gate and up values."""
    return {"activation": spec.activation, "up_activation": spec.up or "linear"}


def flat(x: Float[Array, "... D"]) -> Float[Array, "B D"]:
    """One token per row."""
    return x.reshape(-1, x.shape[-1])


@dataclasses.dataclass(frozen=True)
class KernelExecutor(Executor):
    """`cpu`: native kernels that read each weight once per step, at the speed of memory. `cuda`: Pallas kernels for
    the sparse FFN and attention on an NVIDIA GPU, XLA for the dense products; on another device they are interpreted.
    """

    name: Literal["cpu", "cuda"]

    @property
    def _kernels(self):
        if self.name == "cpu":
            import cpu_kernels as kernels
        else:
            import pallas_kernels as kernels
        return kernels

    def place(
        self, weights: Weights, predictors: tuple[Predictor, ...] | None
    ) -> tuple[Weights, tuple[Predictor, ...] | None]:
        """As `Executor.place`: for a GPU codebooks are made float32, since its kernels look every weight up in them."""
        if self.name == "cuda":
            weights = with_float_codebooks(weights)
        return weights, predictors

    def rows(self, matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
        """As `Executor.rows`."""
        return self._kernels.take_rows(operand(matrix), indices, matrix.shape[1])

    def norm(self, x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
        """As `Executor.norm`: on a GPU by XLA, on a CPU in an order that does not depend on the number of tokens."""
        if self.name == "cuda":
            return rms_norm(x, scale, eps)
        return self._kernels.rms_norm(flat(x), scale, eps).reshape(x.shape)

    def project(
        self, x: Float[Array, "... D"], linears: Sequence[Linear], split: Split = "out"
    ) -> tuple[Float[Array, "... out"], ...]:
        """As `Executor.project`, in one pass over all of them."""
        outs = self._kernels.linear(flat(x), *(operand(linear.rows) for linear in linears))
        outs = (out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs)
        return tuple(out if linear.bias is None else out + linear.bias for out, linear in zip(outs, linears))

    def dense_ffn(self, x: Float[Array, "... D"], ffn: FFNWeights, spec: FFNSpec) -> Float[Array, "... D"]:
        """As `Executor.dense_ffn`."""
        y = self._kernels.dense_ffn(flat(x), *operands(ffn), **activations(spec))
        return y.reshape(x.shape)

    def sparse_ffn(
        self,
        x: Float[Array, "B D"],
        ffn: FFNWeights,
        predictor: Predictor,
        spec: FFNSpec,
        route: Float[Array, "B E"] | None = None,
    ) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
        """As `Executor.sparse_ffn`."""
        return self._kernels.sparse_ffn(
            x,
            *operands(ffn),
            operand(predictor.a),
            operand(predictor.b),
            predictor.bias,
            **activations(spec),
            parallel=spec.pipeline == "parallel",
            route=route,
        )

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
        """As `Executor.attend`; on a GPU XLA takes more tokens than one, whose products fill it."""
        if self.name == "cuda" and q.shape[1] > 1:
            return attend(q, k, v, start, count, cache, window)
        scales = () if cache.key_scale is None else (cache.key_scale, cache.value_scale)
        if self.name == "cuda" and scales:
            (k, k_scale), (v, v_scale) = quantize_heads(k), quantize_heads(v)
            scales = k_scale, v_scale, *scales
        out, *sides = self._kernels.attend(q, k, v, start, count, cache.keys, cache.values, scales, window=window)
        return out, LayerCache(*sides)
