"""Attention of new tokens over a KV cache, by XLA."""

import jax
import jax.numpy as jnp

from jsparse.model.cache import SPARE_SLOTS, LayerCache
from jsparse.typing import Array, Float, Int

_QUERY_BLOCK = 128
"""Tokens whose scores are held at once."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
    cache: LayerCache,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Attention of the new tokens of each sequence over its cache, which takes their keys and values first.

    Args:
      q, k, v: the tokens', rotated.
      start: position of each sequence's first token.
      count: how many of its tokens exist; the others write nothing, and what is returned for them means nothing.
      cache: keys and values of the positions before.
      window: positions a token sees, itself included; None for all, which must then have slots of their own.

    Returns:
      the attended values and the new cache.
    """
    # As many at a time as leave in a ring what the first of them sees.
    size = min(q.shape[1], _QUERY_BLOCK if window is None else SPARE_SLOTS)
    if q.shape[1] == size:
        return _attend(q, k, v, start, count, cache, window)

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    def step(cache, block):
        first, *new = block
        out, cache = _attend(*new, start + first, jnp.clip(count - first, 0, size), cache, window)
        return cache, out

    queries = blocks(q)
    firsts = jnp.arange(len(queries)) * size
    cache, out = jax.lax.scan(step, cache, (firsts, queries, blocks(k), blocks(v)))
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]], cache


def _attend(q, k, v, start, count, cache, window):
    cache = cache.write(k, v, start, count)
    held = cache.positions(start + count - 1)[:, None]
    age = (start[:, None] + jnp.arange(q.shape[1]))[:, :, None] - held
    visible = (held >= 0) & (age >= 0)
    if window is not None:
        visible &= age < window
    keys, values = cache.dequantize()
    # By default XLA takes fewer bits of float32 on accelerators.
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(q, keys, values, mask=visible[:, None]), cache
