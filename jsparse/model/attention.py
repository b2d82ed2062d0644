"""Attention of a whole sequence, and of one token over a KV cache, by XLA."""

import jax
import jax.numpy as jnp

from jsparse.typing import Array, Bool, Float, Int

KVCache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
"""Keys and values of one layer. Slot s holds the newest position p with p % S == s, so a cache no longer than the
sliding window is a ring buffer."""

_QUERY_BLOCK = 512


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], window: int | None
) -> Float[Array, "B T N H"]:
    """Attention of a whole sequence, by blocks of queries so that no (T, T) matrix of a long prompt is held."""
    length = q.shape[1]
    key_positions = jnp.arange(length)

    def attend(start, queries):
        ahead = (start + jnp.arange(queries.shape[1]))[:, None] - key_positions[None, :]
        mask = ahead >= 0
        if window is not None:
            mask &= ahead < window
        return _attention(queries, k, v, mask[None, None])

    if length <= _QUERY_BLOCK:
        return attend(0, q)
    # Behind the last query stand some of zeros, whose results are dropped.
    padded = jnp.pad(q, ((0, 0), (0, -length % _QUERY_BLOCK), (0, 0), (0, 0)))
    blocks = padded.reshape(q.shape[0], -1, _QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)
    starts = jnp.arange(blocks.shape[0]) * _QUERY_BLOCK
    out = jax.lax.map(lambda block: attend(*block), (starts, blocks))
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]


def _attention(q, k, v, mask):
    # By default XLA takes fewer bits of float32 on accelerators.
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask)


def fill_cache(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], lengths: Int[Array, "B"], slots: int, dtype
) -> KVCache:
    """The cache of `slots` slots after a right-padded prompt whose true lengths are given."""
    newest = lengths[:, None] - 1
    position = newest - (newest - jnp.arange(slots)) % slots
    position = jnp.clip(position, 0, k.shape[1] - 1)[:, :, None, None]
    return tuple(jnp.take_along_axis(side, position, axis=1).astype(dtype) for side in (k, v))


def attend(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    position: Int[Array, "B"],
    cache: KVCache,
    window: int | None,
) -> tuple[Float[Array, "B N H"], KVCache]:
    """Attention of one token per sequence over its cache, which takes the token's key and value first.

    Args:
      q, k, v: the token's, rotated.
      position: of the token.
      cache: keys and values of the positions before.
      window: positions a token sees, itself included; None for all.

    Returns:
      the attended values and the new cache.
    """
    cache = write_cache(cache, k, v, position)
    mask = visible_slots(position, cache[0].shape[1], window)
    keys, values = (side.astype(q.dtype) for side in cache)
    return _attention(q[:, None], keys, values, mask[:, None, None, :])[:, 0], cache


def write_cache(
    cache: KVCache, k: Float[Array, "B K H"], v: Float[Array, "B K H"], position: Int[Array, "B"]
) -> KVCache:
    """The cache with one token per sequence written at its position."""
    rows, slot = jnp.arange(k.shape[0]), position % cache[0].shape[1]
    return tuple(side.at[rows, slot].set(new.astype(side.dtype)) for side, new in zip(cache, (k, v)))


def visible_slots(position: Int[Array, "B"], slots: int, window: int | None) -> Bool[Array, "B S"]:
    """Which slots the token at `position`, already written, may attend to."""
    age = (position[:, None] - jnp.arange(slots)) % slots
    visible = age <= position[:, None]
    return visible if window is None else visible & (age < window)
