"""How the pytrees cross to the kernel packages, which know arrays only."""

from jsparse.params import FFNWeights
from jsparse.quantization import Matrix, QuantizedRows
from jsparse.typing import Array, Float

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
