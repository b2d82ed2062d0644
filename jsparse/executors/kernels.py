"""The executors of the kernel packages, which know arrays only and have the same functions of them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from jsparse.arrays import Matrix, QuantizedRows
from jsparse.model.attention import KVCache
from jsparse.model.executor import Executor, Split
from jsparse.model.ffn import FFNSpec
from jsparse.model.weights import FFNWeights, Linear, Predictor
from jsparse.typing import Array, Float, Int

Operand = Array | tuple[Array, Array]
"""A matrix as an array, or as low-bit values and their scales."""


def operand(matrix: Matrix) -> Operand:
    return (matrix.values, matrix.scale) if isinstance(matrix, QuantizedRows) else matrix


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

    def rows(self, matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
        """As `Executor.rows`."""
        return self._kernels.take_rows(operand(matrix), indices, matrix.shape[1])

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
        self, x: Float[Array, "B D"], ffn: FFNWeights, predictor: Predictor, spec: FFNSpec
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
        )

    def attend(
        self,
        q: Float[Array, "B N H"],
        k: Float[Array, "B K H"],
        v: Float[Array, "B K H"],
        position: Int[Array, "B"],
        cache: KVCache,
        window: int | None,
    ) -> tuple[Float[Array, "B N H"], KVCache]:
        """As `Executor.attend`."""
        if self.name == "cuda":
            out, keys, values = self._kernels.attend(q, k, v, position, *cache, window=window)
            return out, (keys, values)
        new, count = (side[:, None] for side in (q, k, v)), jnp.ones_like(position)
        out, keys, values = self._kernels.attend(*new, position, count, *cache, window=window)
        return out[:, 0], (keys, values)
