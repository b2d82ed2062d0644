"""How the pytrees cross to the kernel packages, which know arrays only and have the same functions of them."""

from types import ModuleType

from jsparse.arrays import Matrix, QuantizedRows
from jsparse.model.attention import KVCache
from jsparse.model.ffn import FFNSpec
from jsparse.model.weights import FFNWeights, Predictor
from jsparse.typing import Array, Float, Int

Operand = Array | tuple[Array, Array]
"""A matrix as an array, or as low-bit values and their scales."""


def operand(matrix: Matrix) -> Operand:
    return (matrix.values, matrix.scale) if isinstance(matrix, QuantizedRows) else matrix


def operands(ffn: FFNWeights) -> list[Operand]:
    """Gate, up and down_t."""
    return [operand(matrix) for matrix in (ffn.gate, ffn.up, ffn.down_t)]


def flat(x: Float[Array, "... D"]) -> Float[Array, "B D"]:
    """One token per row."""
    return x.reshape(-1, x.shape[-1])


def dense_ffn(kernels: ModuleType, x: Float[Array, "... D"], ffn: FFNWeights, spec: FFNSpec) -> Float[Array, "... D"]:
    """The FFN over all neurons, by that package."""
    return kernels.dense_ffn(flat(x), *operands(ffn), kind=spec.kind, threshold=spec.threshold).reshape(x.shape)


def sparse_ffn(
    kernels: ModuleType, x: Float[Array, "B D"], ffn: FFNWeights, predictor: Predictor, spec: FFNSpec
) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
    """The FFN restricted to the predicted neurons, by that package."""
    return kernels.sparse_ffn(
        x,
        *operands(ffn),
        operand(predictor.a),
        operand(predictor.b),
        predictor.bias,
        kind=spec.kind,
        threshold=spec.threshold,
        parallel=spec.pipeline == "parallel",
    )


def attend(
    kernels: ModuleType,
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    position: Int[Array, "B"],
    cache: KVCache,
    window: int | None,
) -> tuple[Float[Array, "B N H"], KVCache]:
    """One token per sequence over its cache, by that package."""
    out, keys, values = kernels.attend(q, k, v, position, *cache, window=window)
    return out, (keys, values)
