"""The KV cache of a layer: a ring of slots, with room to write some tokens and take them back."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jsparse.arrays import Matrix
from jsparse.model.config import ModelConfig
from jsparse.typing import Array, Float, Int

SPARE_SLOTS = 32
"""Slots beyond those that a token sees: so many tokens can be written, and taken back, before anything is erased that
is still visible."""


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer. Slot s holds the newest written position p with p % S == s.

    Attributes:
      keys, values: (B, S, K, H), what attention sees: tokens of the same pass, too, see what is stored here.
    """

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]

    @property
    def num_slots(self) -> int:
        return self.keys.shape[1]

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        count: Int[Array, "B"],
    ) -> "LayerCache":
        """The cache with each sequence's first `count` of these tokens at the positions from `start` on."""
        token = jnp.arange(k.shape[1])
        slot = (start[:, None] + token) % self.num_slots
        slot = jnp.where(token < count[:, None], slot, self.num_slots)  # where nothing is written
        rows = jnp.arange(k.shape[0])[:, None]

        def put(side, new):
            return side.at[rows, slot].set(new.astype(side.dtype), mode="drop")

        return LayerCache(put(self.keys, k), put(self.values, v))

    def positions(self, last: Int[Array, "B"]) -> Int[Array, "B S"]:
        """The position that each slot holds when `last` is the newest written; negative where none was."""
        return last[:, None] - (last[:, None] - jnp.arange(self.num_slots)) % self.num_slots


def make_cache(config: ModelConfig, layer: int, batch: int, length: int, dtype: str) -> LayerCache:
    """The empty cache of a layer, for sequences of up to `length` positions."""
    seen = min(length, config.window(layer) or length)
    shape = (batch, seen + SPARE_SLOTS, config.num_kv_heads, config.head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def make_caches(config: ModelConfig, batch: int, length: int, dtype: str) -> tuple[LayerCache, ...]:
    """The empty caches of all layers."""
    return tuple(make_cache(config, layer, batch, length, dtype) for layer in range(config.num_layers))


def cache_dtype(embed: Matrix) -> str:
    """What keys and values are stored in: the dtype of the model's embedding, bfloat16 where that has low-bit rows."""
    return jnp.dtype(getattr(embed, "dtype", jnp.bfloat16)).name


def wide_cache_dtype(embed: Matrix) -> str:
    """As `cache_dtype`, but float32 instead of float16, whose range a pass would have to watch."""
    dtype = cache_dtype(embed)
    return "float32" if dtype == "float16" else dtype
