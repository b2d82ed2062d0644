"""Matrices as they are stored: floats, or low-bit integer rows with a scale per group of columns."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.errors import JsparseError
from jsparse.typing import Array, Float, Int, Shaped

DTYPES = ("float32", "bfloat16", "float16", "int8")
"""What weight matrices may be stored in."""
_LOW_BITS = {"int8": 8, "int4": 4}
_CAST_ELEMENTS = 1 << 22
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a matrix is stored.

    Attributes:
      dtype: float32, bfloat16 or float16; int8 or int4 for low-bit rows.
      group: columns of a row that share a scale; None for the whole row. Low-bit rows alone have scales.
    """

    dtype: str
    group: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Storage":
        """From `str`: a dtype, or a low-bit one and a group, as in "int4:32".

        Raises:
          JsparseError: there is no such storage.
        """
        dtype, _, group = text.partition(":") if isinstance(text, str) else ("", "", "")
        if dtype in _LOW_BITS and (text == dtype or re.fullmatch("[1-9][0-9]{0,4}", group)):
            return cls(dtype, int(group) if group else None)
        if dtype in DTYPES and text == dtype:
            return cls(dtype)
        raise JsparseError(
            f"a matrix cannot be stored in {text!r}; known are {', '.join(DTYPES)}, int4, and of the last two with "
            "columns that share a scale, such as int4:32"
        )

    def __str__(self) -> str:
        return self.dtype if self.group is None else f"{self.dtype}:{self.group}"

    @property
    def bits(self) -> int:
        """Of an element, without scales."""
        return _LOW_BITS.get(self.dtype) or 8 * jnp.dtype(self.dtype).itemsize

    @property
    def is_low_bit(self) -> bool:
        return self.dtype in _LOW_BITS


@partial(jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("storage", "columns"))
@dataclasses.dataclass(frozen=True)
class Rows:
    """A low-bit matrix (rows, columns): element (i, j) is `scale[i, j // group] * q[i, j]`, q a symmetric integer.

    Attributes:
      values: (rows, columns) int8 for 8 bits; (rows, ceil(columns / 2)) uint8 for 4 bits, where byte j holds
        q[2j] + 8 in its low nibble and q[2j + 1] + 8 in its high nibble.
      scale: (rows, groups) float32.
      storage: the bits, and the columns of a group.
      columns: the matrix's width, which the packed values do not tell when it is odd.
    """

    values: Shaped[Array, "..."]
    scale: Shaped[Array, "..."]
    storage: Storage
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.columns)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes


Matrix = Shaped[Array, "_ _"] | Rows


def storage_of(matrix: Matrix) -> Storage:
    """How a matrix is stored."""
    return matrix.storage if isinstance(matrix, Rows) else Storage(jnp.dtype(matrix.dtype).name)


def quantize_rows(matrix: Float[Array, "rows columns"], storage: Storage) -> Rows:
    """Round to low-bit integers, symmetric, each group of columns with the clipping point of least squared error.

    The clipping points tried are fixed fractions of the group's largest magnitude. A group of zeros gets scale 1.

    Raises:
      ValueError: the storage is not of low bits.
    """
    if not storage.is_low_bit:
        raise ValueError(f"storage is {storage}; quantised rows have 8 or 4 bits")
    rows, columns = matrix.shape
    group = storage.group or columns
    grouped = jnp.pad(matrix, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    limit = 2 ** (storage.bits - 1) - 1
    largest = jnp.max(jnp.abs(grouped), axis=2)
    largest = jnp.where(largest > 0, largest, limit)

    def rounded(scale):
        return jnp.clip(jnp.round(grouped / scale[:, :, None]), -limit, limit)

    best_scale, best_error = largest / limit, jnp.full(largest.shape, jnp.inf, matrix.dtype)
    for clip in _CLIPS:
        scale = clip * largest / limit
        error = jnp.sum((rounded(scale) * scale[:, :, None] - grouped) ** 2, axis=2)
        best_scale = jnp.where(error < best_error, scale, best_scale)
        best_error = jnp.minimum(error, best_error)
    best_scale = best_scale.astype(jnp.float32)
    integers = rounded(best_scale.astype(matrix.dtype)).astype(jnp.int8).reshape(rows, -1)[:, :columns]
    values = integers if storage.bits == 8 else _pack_int4(integers)
    return Rows(values, best_scale, storage, columns)


quantize_rows_jit = jax.jit(quantize_rows, static_argnames="storage")


def restore_rows(values: Array, scale: Array, bits: int, columns: int, group: int | None = None) -> Rows:
    """Rows from what was saved of them; until format 1 with a scale (rows,) each."""
    dtype = next(name for name, size in _LOW_BITS.items() if size == bits)
    return Rows(values, scale.reshape(len(values), -1), Storage(dtype, group), columns)


def dequantize(matrix: Matrix) -> Float[Array, "rows columns"]:
    """The matrix in float32, whatever its storage."""
    if not isinstance(matrix, Rows):
        return matrix.astype(jnp.float32)
    integers = _unpack_int4(matrix.values, matrix.columns) if matrix.storage.bits == 4 else matrix.values
    scale = matrix.scale
    if (group := matrix.storage.group) is not None:
        scale = jnp.repeat(scale, group, axis=1)[:, : matrix.columns]
    return integers.astype(jnp.float32) * scale


def cast(matrix: Matrix, dtype: str) -> Matrix:
    """The matrix in another storage (see `Storage.parse`).

    It is computed some rows at a time, so that no float32 copy of a large matrix is held.

    Raises:
      JsparseError: there is no such storage.
    """
    storage = Storage.parse(dtype)
    if storage_of(matrix) == storage:
        return matrix
    rows, columns = matrix.shape

    def part(block: slice) -> Array:
        return take_rows(matrix, jnp.arange(block.start, block.stop))

    step = max(1, _CAST_ELEMENTS // columns)
    blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if storage.is_low_bit:
        return quantize_by_blocks(matrix.shape, blocks, part, storage)
    values = aligned_empty(matrix.shape, jnp.dtype(dtype))
    for block in blocks:
        values[block] = part(block).astype(dtype)
    return jax.device_put(values)


def quantize_by_blocks(
    shape: tuple[int, int], blocks: Iterable[slice], part: Callable[[slice], Array], storage: Storage
) -> Rows:
    """`quantize_rows` of a matrix of that shape, of which `part(block)` gives some rows in float32."""
    width, groups = (shape[1] if storage.bits == 8 else -(-shape[1] // 2)), -(-shape[1] // (storage.group or shape[1]))
    values = aligned_empty((shape[0], width), np.dtype(np.int8 if storage.bits == 8 else np.uint8))
    scale = np.empty((shape[0], groups), np.float32)
    for block in blocks:
        quantized = quantize_rows_jit(part(block), storage)
        values[block], scale[block] = quantized.values, quantized.scale
    return Rows(jax.device_put(values), jnp.asarray(scale), storage, shape[1])


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

    if isinstance(matrix, Rows):
        return dequantize(dataclasses.replace(matrix, values=gather(matrix.values), scale=gather(matrix.scale)))
    return gather(matrix).astype(jnp.float32)


def _pack_int4(integers: Int[Array, "rows columns"]) -> Int[Array, "rows bytes"]:
    nibbles = (integers + 8).astype(jnp.uint8)
    nibbles = jnp.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)), constant_values=8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack_int4(packed: Int[Array, "rows bytes"], columns: int) -> Int[Array, "rows columns"]:
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return nibbles[:, :columns].astype(jnp.int8) - 8
