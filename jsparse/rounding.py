"""Rounding: matrices into the storage that is asked for."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import (
    GROUP,
    Matrix,
    Rows,
    Storage,
    aligned_empty,
    join_groups,
    pack_int4,
    storage_of,
    take_rows,
)
from jsparse.typing import Array, Float, Int

_CAST_ELEMENTS = 1 << 22
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_GROUP_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
_SAMPLE_ELEMENTS = 1 << 18
_SAMPLE_BLOCKS = 16
_ROUNDS = 12
_LARGEST = 65504.0
"""Largest number of float16."""
_LARGEST_LEVEL = 127
"""Largest magnitude in a codebook."""


def quantize_rows(matrix: Float[Array, "rows columns"], storage: Storage) -> Rows:
    """Round to low-bit integers, symmetric, each row with the clipping point of least squared error.

    The clipping points tried are fixed fractions of the row's largest magnitude. A row of zeros gets scale 1.

    Raises:
      ValueError: the storage is not int8 or int4.
    """
    if not storage.is_low_bit or storage.group:
        raise ValueError(f"storage is {storage}; quantised rows with one scale have 8 or 4 bits")
    limit = 2 ** (storage.bits - 1) - 1
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
    values = integers if storage.bits == 8 else pack_int4(integers + 8)
    return Rows(values, best_scale[:, None], storage, matrix.shape[1])


quantize_rows_jit = jax.jit(quantize_rows, static_argnames="storage")


def quantize_groups(matrix: Float[Array, "rows columns"], codebook: Int[Array, "16"]) -> Rows:
    """Round to int4:32: each group of columns with the scale of least squared error.

    The scales tried put the group's largest element, clipped by fixed fractions, on either end of the codebook; each is
    then made the least-squares scale of the codes it gives. A group of zeros gets scale 0.
    """
    columns = matrix.shape[1]
    groups = jnp.pad(matrix, ((0, 0), (0, -columns % GROUP))).reshape(len(matrix), -1, GROUP)
    scale, _ = _fit_groups(groups, codebook)
    scale = _round_to_float16(jnp.clip(scale, -_LARGEST, _LARGEST))
    codes = _nearest(groups, scale, jnp.asarray(codebook, jnp.float32)).reshape(len(matrix), -1)[:, :columns]
    values = join_groups(codes, scale.astype(jnp.float16))
    return Rows(values, None, Storage("int4", GROUP), columns, jnp.asarray(codebook, jnp.int8))


quantize_groups_jit = jax.jit(quantize_groups)


def _round_to_float16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest number of float16, in float32. Not a cast and back, which XLA may take for nothing: the codes would
    be those of another scale."""
    step = float(jnp.finfo(jnp.float16).smallest_subnormal)
    subnormal = jnp.abs(x) < float(jnp.finfo(jnp.float16).tiny)
    return jnp.where(subnormal, jnp.round(x / step) * step, jax.lax.reduce_precision(x, 8, 10))


def _nearest(groups, scale, codebook):
    """Which element of the codebook is nearest to each element of the groups (..., 32) over their scale (...)."""
    return _steps(groups, scale, codebook, jnp.zeros(groups.shape, jnp.uint8), jnp.ones(15, jnp.uint8))


def _rounded(groups, scale, codebook):
    """The element of the codebook itself; it takes no gather, which XLA would not vectorise."""
    return _steps(groups, scale, codebook, jnp.full(groups.shape, codebook[0]), jnp.diff(codebook))


def _steps(groups, scale, codebook, start, steps):
    """Start at `start` and add a step for every middle between two neighbours in the codebook that is exceeded."""
    scaled = groups / jnp.where(scale == 0, 1, scale)[..., None]
    middles = (codebook[1:] + codebook[:-1]) / 2
    return start + sum(jnp.where(scaled > middle, step, 0) for middle, step in zip(middles, steps))


def _fit_groups(groups, codebook):
    """The scale (...) of groups (..., 32), and the codes it gives."""
    levels = jnp.asarray(codebook, jnp.float32)
    place = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    farthest = jnp.take_along_axis(groups, place, axis=-1)[..., 0]
    tried = (jnp.asarray(_GROUP_CLIPS)[:, None] / levels[jnp.asarray([0, -1])]).reshape(-1)

    def attempt(i, best):
        best_scale, best_gain = best
        rounded = _rounded(groups, tried[i] * farthest, levels)
        product, square = jnp.sum(groups * rounded, axis=-1), jnp.sum(rounded**2, axis=-1)
        # What the least-squares scale, product / square, takes from the squared error.
        gain = product**2 / jnp.maximum(square, 1)
        better = gain > best_gain
        return jnp.where(better, product / jnp.maximum(square, 1), best_scale), jnp.where(better, gain, best_gain)

    none = jnp.zeros(farthest.shape)
    scale, _ = jax.lax.fori_loop(0, len(tried), attempt, (none, none))
    return scale, _nearest(groups, scale, levels)


@jax.jit
def fit_codebook(sample: Float[Array, "rows columns"]) -> Int[Array, "16"]:
    """The codebook of int4:32 with the least squared error over sampled rows, by Lloyd's algorithm.

    Codes and scales are chosen for the codebook and the codebook for them in turns; its largest magnitude is 127.
    """
    groups = jnp.pad(sample, ((0, 0), (0, -sample.shape[1] % GROUP))).reshape(-1, GROUP)

    def improve(_, levels):
        scale, codes = _fit_groups(groups, levels)
        members = codes[..., None] == jnp.arange(16)
        weight = jnp.sum(members * (scale**2)[:, None, None], axis=(0, 1))
        total = jnp.sum(members * (scale[:, None] * groups)[..., None], axis=(0, 1))
        moved = jnp.sort(jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), levels))
        return moved * (127 / jnp.max(jnp.abs(moved)))

    levels = jax.lax.fori_loop(0, _ROUNDS, improve, jnp.linspace(-127, 127, 16))
    return jnp.round(levels).astype(jnp.int8)


def cast(matrix: Matrix, dtype: str) -> Matrix:
    """The matrix in another storage (see `Storage.parse`).

    It is computed some rows at a time, so that no float32 copy of a large matrix is held.

    Raises:
      JsparseError: there is no such storage.
      ValueError: the matrix holds NaN or infinity, or what the scales of a low-bit storage cannot hold.
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
    """A matrix of that shape rounded, of which `part(block)` gives some rows in float32.

    Raises:
      ValueError: it holds NaN or infinity, or what the scales of the storage cannot hold.
    """
    rows, columns = shape

    def checked(block: slice) -> Array:
        found = part(block)
        largest = jnp.max(jnp.abs(found), initial=0)
        if not jnp.isfinite(found).all():
            raise ValueError("it holds NaN or infinity")
        if storage.group and largest > _LARGEST * _LARGEST_LEVEL:
            raise ValueError(
                f"it holds {float(largest):.1e}, and {storage} no more than {_LARGEST * _LARGEST_LEVEL:.1e}"
            )
        return found

    values = aligned_empty((rows, storage.row_bytes(columns)), np.dtype(np.int8 if storage.bits == 8 else np.uint8))
    if storage.group:
        codebook = fit_codebook(_sample(shape, part))
        for block in blocks:
            values[block] = quantize_groups_jit(checked(block), codebook).values
        return Rows(jax.device_put(values), None, storage, columns, codebook)
    scale = np.empty((rows, 1), np.float32)
    for block in blocks:
        quantized = quantize_rows_jit(checked(block), storage)
        values[block], scale[block] = quantized.values, quantized.scale
    return Rows(jax.device_put(values), jnp.asarray(scale), storage, columns)


def _sample(shape: tuple[int, int], part: Callable[[slice], Array]) -> Float[Array, "rows columns"]:
    """Some rows of a matrix, evenly spread in blocks."""
    rows, columns = shape
    size = max(1, min(rows, _SAMPLE_ELEMENTS // columns) // _SAMPLE_BLOCKS)
    starts = np.unique(np.linspace(0, rows - size, min(_SAMPLE_BLOCKS, rows)).astype(int)).tolist()
    return jnp.concatenate([jnp.asarray(part(slice(start, start + size)), jnp.float32) for start in starts])
