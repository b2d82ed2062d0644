"""Matrices as they are stored: floats, or low-bit integer rows with a scale per group of columns."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.errors import JsparseError
from jsparse.typing import Array, Float, Int, Shaped

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
"""What a model may be stored in; `jsparse.model.parameters.weight_storage` says what that is for each."""
GROUP = 32
"""Columns of a row that share a scale in the storage int4:32."""
_LOW_BITS = {"int8": 8, "int4": 4}
_KNOWN = ("float32", "bfloat16", "float16", "int8", "int4", f"int4:{GROUP}")


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
        if not isinstance(text, str) or text not in _KNOWN:
            raise JsparseError(f"a matrix cannot be stored in {text!r}; known are {', '.join(_KNOWN)}")
        dtype, _, group = text.partition(":")
        return cls(dtype, int(group) if group else None)

    def __str__(self) -> str:
        return self.dtype if self.group is None else f"{self.dtype}:{self.group}"

    @property
    def bits(self) -> int:
        """Of an element, without scales."""
        return _LOW_BITS.get(self.dtype) or 8 * jnp.dtype(self.dtype).itemsize

    @property
    def is_low_bit(self) -> bool:
        return self.dtype in _LOW_BITS

    def row_bytes(self, columns: int) -> int:
        """Of a row, with the scales that lie in it."""
        return -(-columns * self.bits // 8) + (0 if self.group is None else 2 * -(-columns // self.group))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale", "codebook"),
    meta_fields=("storage", "columns"),
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """A low-bit matrix (rows, columns).

    int8 and int4: element (i, j) is `scale[i, 0] * q[i, j]`, q a symmetric integer. int4:32: it is `s[i, j // 32] *
    codebook[q[i, j]]`, and the scales s lie in the row, so that a row is read as one stream.

    Attributes:
      values: int8: (rows, columns) int8. int4: (rows, ceil(columns / 2)) uint8, where byte j holds q[2j] + 8 in its low
        nibble and q[2j + 1] + 8 in its high nibble. int4:32: (rows, `Storage.row_bytes`) uint8, where the same bytes
        hold q of 0 to 15, and the float16 scales follow, little-endian.
      scale: (rows, 1) float32; None for int4:32.
      storage: the bits, and the columns of a group.
      columns: the matrix's width, which the packed values do not tell.
      codebook: (16,) int8, ascending; None but for int4:32. -8 to 7 hold the blocks of llama.cpp's Q4_0 exactly.
    """

    values: Shaped[Array, "..."]
    scale: Shaped[Array, "..."] | None
    storage: Storage
    columns: int
    codebook: Shaped[Array, "..."] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.columns)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scale, self.codebook) if part is not None)


Matrix = Shaped[Array, "_ _"] | Rows


def storage_of(matrix: Matrix) -> Storage:
    """How a matrix is stored."""
    return matrix.storage if isinstance(matrix, Rows) else Storage(jnp.dtype(matrix.dtype).name)


def restore_rows(values: Array, scale: Array | None, bits: int, columns: int, codebook: Array | None = None) -> Rows:
    """Rows from what was saved of them; until format 1 with a scale (rows,) each.

    Raises:
      ValueError: the arrays do not belong together, or a scale is not finite.
    """
    if bits not in _LOW_BITS.values() or (scale is None) == (codebook is None) or (codebook is not None and bits != 4):
        raise ValueError(f"a matrix of {bits} bits with {'no scales' if scale is None else 'scales'} is unknown")
    dtype = next(name for name, size in _LOW_BITS.items() if size == bits)
    storage = Storage(dtype, None if codebook is None else GROUP)
    rows = Rows(values, None if scale is None else scale.reshape(-1, 1), storage, columns, codebook)
    check_rows(rows)
    return rows


def check_rows(rows: Rows) -> None:
    """Raises: ValueError: the arrays of a low-bit matrix do not belong together, or a scale is not finite."""
    storage, values, codebook, columns = rows.storage, rows.values, rows.codebook, rows.columns
    if str(storage) not in _KNOWN or not storage.is_low_bit:
        raise ValueError(f"low-bit rows cannot be stored in {storage}")
    if (storage.group is None) != (codebook is None) or (codebook is None) == (rows.scale is None):
        raise ValueError(f"{storage} has {'scales' if storage.group is None else 'a codebook'} beside its values alone")
    wanted = (len(values), storage.row_bytes(columns)), jnp.int8 if storage.bits == 8 else jnp.uint8
    if (values.shape, values.dtype) != wanted:
        raise ValueError(f"values of {values.dtype} {values.shape} are not {columns} columns in {storage}")
    if codebook is not None and (codebook.shape, codebook.dtype) != ((16,), jnp.int8):
        raise ValueError(f"a codebook of {codebook.dtype} {codebook.shape}; it has 16 numbers of int8")
    scale = rows.scale if codebook is None else split_groups(values, columns)[1]
    if scale.ndim != 2 or len(scale) != len(values) or (codebook is None and scale.shape[1] != 1):
        raise ValueError(f"scales of shape {scale.shape} do not belong to {len(values)} rows")
    if codebook is None and scale.dtype != jnp.float32:
        raise ValueError(f"scales of {scale.dtype}; they must be float32")
    if not jnp.isfinite(scale).all():
        raise ValueError("a scale is NaN or infinite")


def dequantize(matrix: Matrix) -> Float[Array, "rows columns"]:
    """The matrix in float32, whatever its storage."""
    if not isinstance(matrix, Rows):
        return matrix.astype(jnp.float32)
    if matrix.codebook is not None:
        codes, scale = split_groups(matrix.values, matrix.columns)
        levels = matrix.codebook.astype(jnp.float32)[unpack_int4(codes, matrix.columns)]
        return levels * jnp.repeat(scale.astype(jnp.float32), GROUP, axis=1)[:, : matrix.columns]
    integers = matrix.values
    if matrix.storage.bits == 4:
        integers = unpack_int4(integers, matrix.columns).astype(jnp.int8) - 8
    return integers.astype(jnp.float32) * matrix.scale


def split_groups(
    values: Int[Array, "rows bytes"], columns: int
) -> tuple[Int[Array, "rows codes"], Float[Array, "rows groups"]]:
    """The packed codes of int4:32 rows, and their float16 scales."""
    width = -(-columns // 2)
    pairs = values[:, width:].reshape(len(values), -1, 2)
    return values[:, :width], jax.lax.bitcast_convert_type(pairs, jnp.float16)


def join_groups(codes: Int[Array, "rows columns"], scale: Float[Array, "rows groups"]) -> Int[Array, "rows bytes"]:
    """The values of int4:32 rows from codes of 0 to 15 and float16 scales."""
    pairs = jax.lax.bitcast_convert_type(scale.astype(jnp.float16), jnp.uint8)
    return jnp.concatenate([pack_int4(codes), pairs.reshape(len(codes), -1)], axis=1)


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
        scale = None if matrix.scale is None else gather(matrix.scale)
        return dequantize(dataclasses.replace(matrix, values=gather(matrix.values), scale=scale))
    return gather(matrix).astype(jnp.float32)


def pack_int4(codes: Int[Array, "rows columns"]) -> Int[Array, "rows bytes"]:
    """Two codes of 0 to 15 a byte, the first in the low nibble; an odd row ends in an 8."""
    nibbles = codes.astype(jnp.uint8)
    nibbles = jnp.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)), constant_values=8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Int[Array, "rows bytes"], columns: int) -> Int[Array, "rows columns"]:
    """Codes of 0 to 15 from bytes that hold two each: the inverse of `pack_int4`."""
    nibbles = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return nibbles[:, :columns]
