"""The CPU executor: native kernels that read each weight once per step, at the speed of memory."""

from collections.abc import Sequence

from jsparse.arrays import Matrix
from jsparse.executors import operands
from jsparse.executors.operands import flat, operand
from jsparse.model.attention import KVCache
from jsparse.model.ffn import FFNSpec
from jsparse.model.weights import FFNWeights, Predictor
from jsparse.typing import Array, Float, Int


def unavailable() -> str | None:
    """Why this executor cannot run here, or None."""
    import cpu_kernels

    return cpu_kernels.unavailable()


def take_rows(matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
    """Rows of the matrix in float32. XLA would widen all of a 16-bit matrix to take some."""
    import cpu_kernels

    return cpu_kernels.take_rows(operand(matrix), indices, matrix.shape[1])


def linear(x: Float[Array, "... D"], weight: Matrix) -> Float[Array, "... out"]:
    """x W^T, W (out, D)."""
    return linears(x, [weight])[0]


def linears(x: Float[Array, "... D"], weights: Sequence[Matrix]) -> tuple[Float[Array, "... out"], ...]:
    """x W^T for every W, in one pass."""
    import cpu_kernels

    outs = cpu_kernels.linear(flat(x), *map(operand, weights))
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs)


def dense_ffn(x: Float[Array, "... D"], ffn: FFNWeights, spec: FFNSpec) -> Float[Array, "... D"]:
    """The FFN over all neurons (the formula is at `FFNSpec`)."""
    import cpu_kernels

    return operands.dense_ffn(cpu_kernels, x, ffn, spec)


def sparse_ffn(
    x: Float[Array, "B D"], ffn: FFNWeights, predictor: Predictor, spec: FFNSpec
) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
    """The FFN restricted to the predicted neurons, reading the rows of no others; as `xla.sparse_ffn`."""
    import cpu_kernels

    return operands.sparse_ffn(cpu_kernels, x, ffn, predictor, spec)


def attend(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    position: Int[Array, "B"],
    cache: KVCache,
    window: int | None,
) -> tuple[Float[Array, "B N H"], KVCache]:
    """One token per sequence over its cache, which takes its key and value in place; as `attention.attend`."""
    import cpu_kernels

    return operands.attend(cpu_kernels, q, k, v, position, cache, window)
