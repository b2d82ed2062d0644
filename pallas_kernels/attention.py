"""Attention of one token per sequence over its KV cache, in two kernels.

`attend` has a program per key head and run of slots, which also puts the token's key and value in their slot. Each
leaves a softmax of its own; `combine` weighs them by what they leave out.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import call, load, program_id, store, when

_PROGRAMS = 256
"""Fewest to keep a GPU busy, for which runs of slots get shorter."""
_SLOTS = (64, 32)
_GROUP = 32
"""Channels of an int8 cache that share a scale."""
_COMBINED = 32
"""Runs of slots that are added up at once."""


@partial(jax.jit, static_argnames="window")
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    count: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    scales: tuple[jax.Array, ...] = (),
    *,
    window: int | None = None,
) -> tuple[jax.Array, ...]:
    """The attended values (B, 1, N, H) float32, and the caches with the token in them, in place where they are donated.

    Args:
      q: (B, 1, N, H) queries, rotated.
      k, v: (B, 1, K, H), key and value of the same token, int8 where the cache is; N is a multiple of K.
      start: (B,) int32, the token's position.
      count: (B,) int32, 1, or 0 where there is no token: nothing is written then, and zeros come out.
      keys, values: (B, S, K, H); slot s holds the newest position p with p % S == s.
      scales: of int8 the bfloat16 scales of k, v, keys and values in this order, (..., ceil(H / 32)): one for every 32
        channels.
      window: positions a token sees, itself included; None for all.

    The caches' scales are returned after them.

    Raises:
      ValueError: there are more tokens than one.
    """
    if q.shape[1] != 1:
        raise ValueError(f"q has {q.shape[1]} tokens a sequence; the kernel takes one")
    batch, _, num_heads, head_dim = q.shape
    num_slots, num_kv_heads = keys.shape[1:3]
    group = num_heads // num_kv_heads
    size = next((n for n in _SLOTS if batch * num_kv_heads * -(-num_slots // n) >= _PROGRAMS), _SLOTS[-1])
    splits = -(-num_slots // size)
    padded = 1 << (head_dim - 1).bit_length()
    width = min(_GROUP, padded) if scales else padded
    caches = keys, values, *scales[2:]
    first = 5 + len(scales) // 2  # among the operands

    def body(q_ref, k_ref, v_ref, start_ref, count_ref, *refs):
        new_scales, refs = refs[: len(scales) // 2], refs[len(scales) // 2 :]
        old, new_caches = refs[: len(caches)], refs[len(caches) : 2 * len(caches)]
        partial_ref, largest_ref, total_ref = refs[2 * len(caches) :]
        split, head, token = program_id(0), program_id(1), program_id(2)
        now, exists = start_ref[token], count_ref[token] > 0
        newest = now % num_slots
        slots = split * size + jnp.arange(size)
        age = newest - slots
        age = jnp.where(age < 0, age + num_slots, age)
        visible = exists & (slots < num_slots) & (age <= now)
        if window is not None:
            visible &= age < window
        groups = jnp.arange(padded // width)
        dims = groups[:, None] * width + jnp.arange(width)[None]
        inside = None if padded == head_dim else dims < head_dim

        def take(cache, new_ref, at, inside):
            """Load the slots' elements `at` from the cache, and those of the newest slot from the token itself."""
            shape = (size,) + (1,) * at.ndim
            mask = visible.reshape(shape) if inside is None else visible.reshape(shape) & inside[None]
            old = load(cache, token, slots.reshape(shape), head, at[None], mask=mask)
            new = load(new_ref, token, head, at, mask=inside).astype(cache.dtype)
            return jnp.where((slots == newest).reshape(shape), new[None], old).astype(jnp.float32)

        head_keys, head_values = (take(cache, new_ref, dims, inside) for cache, new_ref in zip(old, (k_ref, v_ref)))
        if scales:
            inside_group = None if inside is None else groups * width < head_dim
            factors = [take(cache, new_ref, groups, inside_group) for cache, new_ref in zip(old[2:], new_scales)]
        for n in range(group):
            query = load(q_ref, token, head * group + n, dims, mask=inside) * head_dim**-0.5
            scores = jnp.sum(head_keys * query[None], axis=2)
            scores = jnp.sum(scores * factors[0] if scales else scores, axis=1)
            scores = jnp.where(visible, scores, -jnp.inf)
            largest = jnp.max(scores)
            weights = jnp.where(visible, jnp.exp(scores - largest), 0)
            total_ref[token, head * group + n, split] = jnp.sum(weights)
            weights = weights[:, None] * factors[1] if scales else weights[:, None]
            sums = jnp.sum(weights[:, :, None] * head_values, axis=0)
            store(partial_ref, sums, token, head * group + n, split, dims)
            largest_ref[token, head * group + n, split] = largest

        @when(exists & (newest // size == split))
        def _():
            for new_ref, cache in zip((k_ref, v_ref, *new_scales), new_caches):
                for start, length in _powers_of_two(cache.shape[-1]):
                    part = start + jnp.arange(length)
                    store(cache, load(new_ref, token, head, part).astype(cache.dtype), token, newest, head, part)

    new = [q[:, 0].astype(jnp.float32), *(side[:, 0] if scales else side[:, 0].astype(jnp.float32) for side in (k, v))]
    *caches, partial, largest, total = call(
        body,
        *new,
        *(array.astype(jnp.int32) for array in (start, count)),
        *(scale[:, 0] for scale in scales[:2]),
        *caches,
        name="attend",
        grid=(splits, num_kv_heads, batch),
        out_shape=[
            *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches),
            jax.ShapeDtypeStruct((batch, num_heads, splits, padded), jnp.float32),
            *[jax.ShapeDtypeStruct((batch, num_heads, splits), jnp.float32)] * 2,
        ],
        aliases={first + i: i for i in range(len(caches))},
        warps=size // 8,
    )
    return _combine(partial, largest, total)[:, None, :, :head_dim], *caches


def _combine(partial: jax.Array, largest: jax.Array, total: jax.Array) -> jax.Array:
    """(B, N, H) from the softmaxes of the runs of slots: their sums (B, N, runs, H), largest scores and totals."""
    batch, num_heads, splits, width = partial.shape
    lanes = min(_COMBINED, 1 << (splits - 1).bit_length())

    def body(partial_ref, largest_ref, total_ref, out_ref):
        head, token = program_id(0), program_id(1)
        dims = jnp.arange(width)
        every = jnp.arange(1 << (splits - 1).bit_length())
        most = load(largest_ref, token, head, every, mask=every < splits)
        most = jnp.max(jnp.where(every < splits, most, -jnp.inf))

        def step(i, carry):
            sums, totals = carry
            runs = i * lanes + jnp.arange(lanes)
            exists = runs < splits
            largest = load(largest_ref, token, head, runs, mask=exists)
            weight = jnp.where(exists & (largest != -jnp.inf), jnp.exp(largest - most), 0)
            rows = load(partial_ref, token, head, runs[:, None], dims[None], mask=exists[:, None])
            totals += jnp.sum(weight * load(total_ref, token, head, runs, mask=exists))
            return sums + jnp.sum(weight[:, None] * rows, axis=0), totals

        sums, totals = jax.lax.fori_loop(0, -(-splits // lanes), step, (jnp.zeros(width, jnp.float32), jnp.float32(0)))
        # Of a token that does not exist nothing is visible.
        store(out_ref, jnp.where(totals == 0, 0, sums / totals), token, head, dims)

    (out,) = call(
        body,
        partial,
        largest,
        total,
        name="combine",
        grid=(num_heads, batch),
        out_shape=[jax.ShapeDtypeStruct((batch, num_heads, width), jnp.float32)],
        warps=4,
    )
    return out


def _powers_of_two(number: int) -> list[tuple[int, int]]:
    """Starts and lengths of runs that cover the number and have a power of two each."""
    runs, start = [], 0
    for bit in reversed(range(number.bit_length())):
        if number & 1 << bit:
            runs.append((start, 1 << bit))
            start += 1 << bit
    return runs
