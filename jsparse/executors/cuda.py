"""The CUDA executor: Pallas kernels for the sparse FFN on an NVIDIA GPU, XLA for the dense products."""

from collections.abc import Sequence

from jsparse.arrays import Matrix, take_rows
from jsparse.executors import operands
from jsparse.executors.operands import flat, operand
from jsparse.model.attention import KVCache
from jsparse.model.ffn import FFNSpec
from jsparse.model.weights import FFNWeights, Predictor
from jsparse.typing import Array, Float, Int

__all__ = ["attend", "dense_ffn", "linear", "linears", "sparse_ffn", "take_rows", "unavailable"]


def unavailable() -> str | None:
    """Why this executor cannot run here, or None."""
    import pallas_kernels

    return pallas_kernels.unavailable()


def linear(x: Float[Array, "... D"], weight: Matrix) -> Float[Array, "... out"]:
    """x W^T, W (out, D)."""
    import pallas_kernels

    out = pallas_kernels.linear(flat(x), operand(weight))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def linears(x: Float[Array, "... D"], weights: Sequence[Matrix]) -> tuple[Float[Array, "... out"], ...]:
    """x W^T for every W."""
    return tuple(linear(x, weight) for weight in weights)


def dense_ffn(x: Float[Array, "... D"], ffn: FFNWeights, spec: FFNSpec) -> Float[Array, "... D"]:
    """The FFN over all neurons (the formula is at `FFNSpec`)."""
    import pallas_kernels

    return operands.dense_ffn(pallas_kernels, x, ffn, spec)


def sparse_ffn(
    x: Float[Array, "B D"], ffn: FFNWeights, predictor: Predictor, spec: FFNSpec
) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
    """The FFN restricted to the predicted neurons, reading the rows of no others; as `xla.sparse_ffn`."""
    import pallas_kernels

    return operands.sparse_ffn(pallas_kernels, x, ffn, predictor, spec)


def attend(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    position: Int[Array, "B"],
    cache: KVCache,
    window: int | None,
) -> tuple[Float[Array, "B N H"], KVCache]:
    """One token per sequence over its cache, which takes its key and value in place; as `attention.attend`."""
    import pallas_kernels

    return operands.attend(pallas_kernels, q, k, v, position, cache, window)
