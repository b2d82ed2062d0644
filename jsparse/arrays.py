"""Matrices stored as low-bit integer rows with one scale per row."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.typing import Array, Float, Int, Shaped

DTYPES = ("float32", "bfloat16", "float16", "int8")
"""What matrices may be stored in."""
_CAST_ELEMENTS = 1 << 22
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("bits", "columns"))
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """A matrix (rows, columns) whose element (i, j) is `scale[i] * q[i, j]`, q a symmetric `bits`-bit integer.

    Attributes:
      values: (rows, columns) int8 for 8 bits; (rows, ceil(columns / 2)) uint8 for 4 bits, where byte j holds
        q[2j] + 8 in its low nibble and q[2j + 1] + 8 in its high nibble.
      scale: (rows,) float32.
      bits: 8 or 4.
      columns: the matrix's width, which the packed values do not tell when it is odd.
    """

    values: Shaped[Array, "..."]
    scale: Shaped[Array, "..."]
    bits: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.columns)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Matrix = Shaped[Array, "_ _"] | QuantizedRows


def quantize_rows(matrix: Float[Array, "rows columns"], bits: int) -> QuantizedRows:
    """Round each row to `bits`-bit integers, symmetric, with the clipping point of least squared error.

    The clipping points tried are fixed fractions of the row's largest magnitude. A row of zeros gets scale 1.

    Raises:
      ValueError: bits is not 8 or 4.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits}; quantised rows have 8 or 4")
    limit = 2 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(matrix), axis=1)
    largest = jnp.where(largest > 0, largest, limit)

    def rounded(scale):
        return jnp.clip(jnp.round(matrix / scale[:, None]), -limit, limit)

    best_scale, best_error = largest / limit, jnp.full(largest.shape, jnp.inf, matrix.dtype)
    for clip in _CLIPS:
        scale = clip * largest / limit
        error = jnp.sum((rounded(scale) * scale[:, None] - matrix) ** 2, axis=1)
        best_scale = jnp.where(error < best_error, scale, best_scale)
        best_error = jnp.minimum(error, best_error)
    best_scale = best_scale.astype(jnp.float32)
    integers = rounded(best_scale.astype(matrix.dtype)).astype(jnp.int8)
    values = integers if bits == 8 else _pack_int4(integers)
    return QuantizedRows(values, best_scale, bits, matrix.shape[1])


quantize_rows_jit = jax.jit(quantize_rows, static_argnames="bits")


def dequantize(matrix: Matrix) -> Float[Array, "rows columns"]:
    """The matrix in float32, whatever its storage."""
    if not isinstance(matrix, QuantizedRows):
        return matrix.astype(jnp.float32)
    integers = _unpack_int4(matrix.values, matrix.columns) if matrix.bits == 4 else matrix.values
    return integers.astype(jnp.float32) * matrix.scale[:, None]


def cast(matrix: Matrix, dtype: str) -> Matrix:
    """The matrix in float32, bfloat16, float16, or as int8 rows.

    It is computed some rows at a time, so that no float32 copy of a large matrix is held.
    """
    is_low_bit = isinstance(matrix, QuantizedRows)
    if (is_low_bit and matrix.bits == 8 and dtype == "int8") or (not is_low_bit and matrix.dtype == dtype):
        return matrix
    rows, columns = matrix.shape

    def part(block: slice) -> Array:
        return take_rows(matrix, jnp.arange(block.start, block.stop))

    step = max(1, _CAST_ELEMENTS // columns)
    blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if dtype == "int8":
        return quantize_by_blocks(matrix.shape, blocks, part)
    values = aligned_empty(matrix.shape, jnp.dtype(dtype))
    for block in blocks:
        values[block] = part(block).astype(dtype)
    return jax.device_put(values)


def quantize_by_blocks(
    shape: tuple[int, int], blocks: Iterable[slice], part: Callable[[slice], Array]
) -> QuantizedRows:
    """`quantize_rows` to 8 bits of a matrix of that shape, of which `part(block)` gives some rows in float32."""
    values, scale = aligned_empty(shape, np.dtype(np.int8)), np.empty(shape[0], np.float32)
    for block in blocks:
        quantized = quantize_rows_jit(part(block), 8)
        values[block], scale[block] = quantized.values, quantized.scale
    return QuantizedRows(jax.device_put(values), jnp.asarray(scale), 8, shape[1])


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a 64-byte boundary, which `jax.device_put` adopts on a CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def take_rows(matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
    """Rows `indices` of the matrix in float32; only those rows are read. An index past the end gives zeros."""

    def gather(array):
        if array.dtype.itemsize != 2:
            return array.at[indices].get(mode="fill", fill_value=0)
        # As whole numbers: on a CPU, XLA would first widen the whole matrix to gather rows of a 16-bit float.
        bits = jax.lax.bitcast_convert_type(array, jnp.uint16).at[indices].get(mode="fill", fill_value=0)
        return jax.lax.bitcast_convert_type(bits, array.dtype)

    if isinstance(matrix, QuantizedRows):
        return dequantize(dataclasses.replace(matrix, values=gather(matrix.values), scale=gather(matrix.scale)))
    return gather(matrix).astype(jnp.float32)


def _pack_int4(integers: Int[Array, "rows columns"]) -> Int[Array, "rows bytes"]:
    nibbles = (integers + 8).astype(jnp.uint8)
    nibbles = jnp.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)), constant_values=8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack_int4(packed: Int[Array, "rows bytes"], columns: int) -> Int[Array, "rows columns"]:
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return nibbles[:, :columns].astype(jnp.int8) - 8
