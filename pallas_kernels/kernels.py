"""The sparse FFN's two kernels.

`predict_gate_up` has a program per block of neurons and sequence. It scores the block's neurons, and for those that it
predicts, some rows at a time, computes the gate and, where that survives, up; what is left is a list per block.
`down` adds up the down rows of the survivors of some blocks, for some columns; the sum over its programs is left to
XLA. No kernel waits for another's programs and none uses atomics: the order of every sum is fixed.

A matrix is an array, or `(values, scale)` with a scale per row: values int8, or uint8 with two 4-bit numbers a byte; or
`(values, codebook)`: 4-bit codes of the codebook (16,), and behind a row's codes a float16 scale per 32 columns.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import grouped
from pallas_kernels.lowering import call, load, program_id, store, when
from pallas_kernels.tiles import Tiles

Matrix = jax.Array | tuple[jax.Array, jax.Array]
Shape = jax.ShapeDtypeStruct

_PREDICTOR_COLUMNS = 256
_FEWEST_COLUMNS = 64
"""Of `down`, before its columns divide the width."""


def nibbles(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The even and the odd columns of a matrix with two 4-bit numbers a byte."""
    packed = packed.astype(jnp.int32)
    return (packed & 15) - 8, (packed >> 4) - 8


def is_grouped(matrix) -> bool:
    """Whether a matrix, or its refs, has scales in its rows and a codebook."""
    return isinstance(matrix, tuple | list) and matrix[0].dtype == jnp.uint8 and len(matrix[1].shape) == 1


def predict_gate_up(
    x: jax.Array,
    features: jax.Array,
    b: Matrix,
    bias: jax.Array,
    gate: Matrix,
    up: Matrix | None,
    threshold: jax.Array,
    route: jax.Array | None,
    *,
    phi: Callable,
    psi: Callable,
    parallel: bool,
    tiles: Tiles,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The neurons with (b features + bias) > 0 that phi(gate x) * psi(up x) leaves.

    Args:
      x: (B, D) float32.
      features: (B, R) float32, a x.
      b, bias: (F, R), (F,) float32.
      gate, up: (F, D); up may be None.
      threshold: (F,) float32.
      route: (B, E), factors of the hidden values of E groups of F / E neurons, or None; where it is zero a group is
        neither scored nor read.
      phi: of a gate value and its neuron's threshold, zero for a neuron that does not survive; psi: of up.
      parallel: read up's rows beside gate's, not only those of neurons that survive the gate.

    Returns:
      survivors (B, blocks, neurons per block) int32, those of a block at the head of its list;
      hidden, their phi(gate) * psi(up), likewise;
      counts (B, blocks, 2) int32, predicted neurons and survivors of each block.
    """
    batch, num_neurons = x.shape[0], bias.shape[0]
    size, blocks = tiles.neurons, -(-num_neurons // tiles.neurons)
    columns = min(tiles.columns, _power_of_two(x.shape[1]))

    def body(*refs):
        refs = iter(refs)
        x_ref = next(refs)
        features_ref = next(refs)
        b_ref, bias_ref, gate_ref = _take(b, refs), next(refs), _take(gate, refs)
        up_ref = None if up is None else _take(up, refs)
        threshold_ref = next(refs)
        route_ref = None if route is None else next(refs)
        survivors_ref, hidden_ref, counts_ref = refs
        block, token = program_id(0), program_id(1)
        neurons = block * size + jnp.arange(size)
        exists = neurons < num_neurons
        if route is not None:
            group_size = num_neurons // route.shape[1]
            exists &= load(route_ref, token, neurons // group_size, mask=exists) != 0

        scores = _scores(b_ref, features_ref, token, neurons, exists) + load(bias_ref, neurons, mask=exists)
        predicted = exists & (scores > 0)
        place = jnp.cumsum(predicted.astype(jnp.int32)) - 1
        num_predicted = jnp.sum(predicted.astype(jnp.int32))

        dot = functools.partial(_dot, x_ref, token, columns)

        def step(i, num_survivors):
            slots = i * tiles.rows + jnp.arange(tiles.rows)
            wanted = slots < num_predicted
            # The neurons in those places, without going through memory.
            chosen = predicted[:, None] & (place[:, None] == slots[None])
            rows = jnp.sum(jnp.where(chosen, neurons[:, None], 0), axis=0)
            hidden = phi(dot(gate_ref, rows, wanted), load(threshold_ref, rows, mask=wanted))
            if route is not None:
                hidden = hidden * load(route_ref, token, rows // group_size, mask=wanted)
            survives = wanted & (hidden != 0)
            if up_ref is not None:
                hidden = hidden * psi(dot(up_ref, rows, wanted if parallel else survives))
            hidden = jnp.where(survives, hidden, 0)
            to, kept = _survivors_first(hidden != 0)
            store(survivors_ref, rows, token, block, num_survivors + to)
            store(hidden_ref, hidden, token, block, num_survivors + to)
            return num_survivors + kept

        steps = (num_predicted + tiles.rows - 1) // tiles.rows
        num_survivors = jax.lax.fori_loop(0, steps, step, jnp.int32(0))
        counts_ref[token, block, 0] = num_predicted
        counts_ref[token, block, 1] = num_survivors

    return call(
        body,
        x,
        features,
        *_arrays(b),
        bias,
        *_arrays(gate),
        *(() if up is None else _arrays(up)),
        threshold,
        *(() if route is None else (route.astype(jnp.float32),)),
        name="predict_gate_up",
        grid=(blocks, batch),
        out_shape=[
            Shape((batch, blocks, size), jnp.int32),
            Shape((batch, blocks, size), jnp.float32),
            Shape((batch, blocks, 2), jnp.int32),
        ],
        warps=tiles.gate_warps,
    )


def _scores(b: list, features_ref, token: jax.Array, neurons: jax.Array, exists: jax.Array) -> jax.Array:
    """b features of some neurons, those of them that exist."""
    width, rank = b[0].shape[1], features_ref.shape[1]
    scores = 0.0
    for cols, inside in _chunks(width, min(_PREDICTOR_COLUMNS, _power_of_two(width))):
        stored = load(b[0], neurons[:, None], cols[None], mask=_all(exists[:, None], inside))
        packed = stored.dtype == jnp.uint8
        for i, part in enumerate(nibbles(stored) if packed else [stored]):
            of = cols * 2 + i if packed else cols
            feature = load(features_ref, token, of, mask=None if inside is None and rank % 2 == 0 else of < rank)
            scores += part.astype(jnp.float32) * feature[None]
    return _scaled(jnp.sum(scores, axis=1), b, neurons, exists)


def _dot(x_ref, token: jax.Array, columns: int, matrix: list, rows: jax.Array, wanted: jax.Array) -> jax.Array:
    """Some rows of a matrix times the token's x, so many columns at a time; only wanted rows are read."""
    if is_grouped(matrix):
        return grouped.dot(x_ref, [token], matrix, rows, wanted, -(-columns // 32))[0]
    sums = 0.0
    for cols, inside in _chunks(x_ref.shape[1], columns):
        weights = load(matrix[0], rows[:, None], cols[None], mask=_all(wanted[:, None], inside))
        sums += weights.astype(jnp.float32) * load(x_ref, token, cols, mask=inside)[None]
    return _scaled(jnp.sum(sums, axis=1), matrix, rows, wanted)


def _survivors_first(survives: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where each goes so that survivors stand first, in order, and how many they are. What comes behind them the next
    step overwrites."""
    keep = survives.astype(jnp.int32)
    before, kept = jnp.cumsum(keep), jnp.sum(keep)
    return jnp.where(keep == 1, before - 1, kept + jnp.arange(keep.size) - before), kept


def down(
    survivors: jax.Array, hidden: jax.Array, counts: jax.Array, down_t: Matrix, width: int, *, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """What is left of the FFN.

    Args:
      survivors, hidden, counts: as `predict_gate_up` returns them.
      down_t: (F, D).
      width: D.

    Returns:
      partial sums (B, programs, D) float32 of hidden times the down rows of the survivors;
      totals (B, 2) int32 of the counts, which would take XLA a kernel of its own.
    """
    batch, blocks, _ = survivors.shape
    # The columns that a program's are counted in: bytes of two, where the rows are packed.
    in_each = 2 if is_grouped(down_t) else 1
    counted = -(-width // in_each)
    columns = min(tiles.down_columns, _power_of_two(counted))
    if (divisor := counted & -counted) >= _FEWEST_COLUMNS:
        columns = min(columns, divisor)
    programs = -(-blocks // tiles.groups)

    def body(survivors_ref, hidden_ref, counts_ref, *refs):
        *down_refs, partial_ref, totals_ref = refs
        program, token = program_id(0), program_id(2)
        lanes = jnp.arange(tiles.groups * tiles.slots)
        group = program * tiles.groups + lanes // tiles.slots
        start = program_id(1) * columns
        cols = grouped.columns(start, columns)[1] if in_each == 2 else start + jnp.arange(columns)
        inside = None if counted % columns == 0 else cols < counted
        num_survivors = load(counts_ref, token, group, 1, mask=group < blocks)

        def step(i, sums):
            slots = i * tiles.slots + lanes % tiles.slots
            wanted = slots < num_survivors
            rows = load(survivors_ref, token, group, slots, mask=wanted)
            weight = load(hidden_ref, token, group, slots, mask=wanted)
            if in_each == 2:
                products = grouped.times_rows(weight, down_refs, rows, wanted, start, columns, width)
            else:
                weight = _scaled(weight, down_refs, rows, wanted)
                mask = _all(wanted[:, None], inside)
                products = [
                    weight[:, None] * load(down_refs[0], rows[:, None], cols[None], mask=mask).astype(jnp.float32)
                ]
            return [total + part for total, part in zip(sums, products)]

        steps = (jnp.max(num_survivors) + tiles.slots - 1) // tiles.slots
        sums = jax.lax.fori_loop(0, steps, step, [jnp.zeros((lanes.size, *cols.shape), jnp.float32)] * in_each)

        @when((program == 0) & (program_id(1) == 0))
        def _():
            every = jnp.arange(_power_of_two(blocks))
            for kind in range(2):
                totals_ref[token, kind] = jnp.sum(load(counts_ref, token, every, kind, mask=every < blocks))

        # The columns past the end, of which there are some where columns do not divide the width, are cut off below.
        for i, total in enumerate(sums):
            store(partial_ref, jnp.sum(total, axis=0), token, program, in_each * cols + i)

    padded = -(-counted // columns) * columns
    partial, totals = call(
        body,
        survivors,
        hidden,
        counts,
        *_arrays(down_t),
        name="down",
        grid=(programs, padded // columns, batch),
        out_shape=[Shape((batch, programs, in_each * padded), jnp.float32), Shape((batch, 2), jnp.int32)],
        warps=tiles.down_warps,
    )
    return partial[:, :, :width], totals


def values_of(matrix: Matrix) -> jax.Array:
    """Without the scales or the codebook."""
    return _arrays(matrix)[0]


def _arrays(matrix: Matrix) -> tuple[jax.Array, ...]:
    return matrix if isinstance(matrix, tuple) else (matrix,)


def _take(matrix: Matrix, refs: Iterator) -> list:
    """The refs of a matrix: values, and where it has one the scale or the codebook."""
    return [next(refs) for _ in _arrays(matrix)]


def _scaled(sums: jax.Array, matrix: list, rows: jax.Array, wanted: jax.Array) -> jax.Array:
    return sums if len(matrix) == 1 else sums * load(matrix[1], rows, 0, mask=wanted)


def _chunks(width: int, size: int) -> Iterator[tuple[jax.Array, jax.Array | None]]:
    """Columns by `size`, and which of them exist, or None where all do."""
    for start in range(0, width, size):
        cols = start + jnp.arange(size)
        yield cols, None if start + size <= width else cols < width


def _all(rows: jax.Array, columns: jax.Array | None) -> jax.Array:
    return rows if columns is None else rows & columns[None]


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()
