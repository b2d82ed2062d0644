"""The KV cache of a layer: a ring of slots, with room to write some tokens and take them back."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import GROUP, Matrix
from jsparse.model.config import ModelConfig
from jsparse.typing import Array, Float, Int, Shaped

SPARE_SLOTS = 32
"""Slots beyond those that a token sees: so many tokens can be written, and taken back, before anything is erased that
is still visible."""


KV_DTYPES = ("float32", "bfloat16", "float16", "int8")
"""What keys and values may be stored in."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "key_scale", "value_scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer. Slot s holds the newest written position p with p % S == s.

    Attributes:
      keys, values: (B, S, K, H), what attention sees: tokens of the same pass, too, see what is stored here.
      key_scale, value_scale: (B, S, K, ceil(H / 32)) bfloat16 where keys and values are int8: channel h is its integer
        times scale h // 32. None where they are floats.
    """

    keys: Shaped[Array, "B S K H"]
    values: Shaped[Array, "B S K H"]
    key_scale: Float[Array, "B S K G"] | None = None
    value_scale: Float[Array, "B S K G"] | None = None

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

        if self.key_scale is None:
            return LayerCache(put(self.keys, k), put(self.values, v))
        (k, k_scale), (v, v_scale) = quantize_heads(k), quantize_heads(v)
        scales = put(self.key_scale, k_scale), put(self.value_scale, v_scale)
        return LayerCache(put(self.keys, k), put(self.values, v), *scales)

    def dequantize(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values in float32."""
        return dequantize_heads(self.keys, self.key_scale), dequantize_heads(self.values, self.value_scale)

    def positions(self, last: Int[Array, "B"]) -> Int[Array, "B S"]:
        """The position that each slot holds when `last` is the newest written; negative where none was."""
        return last[:, None] - (last[:, None] - jnp.arange(self.num_slots)) % self.num_slots


def quantize_heads(x: Float[Array, "... H"]) -> tuple[Int[Array, "... H"], Float[Array, "... G"]]:
    """Keys or values in int8, and a bfloat16 scale for every 32 channels of a head: the one that takes the largest
    magnitude to 127. A group that holds NaN or infinity gets a scale that is NaN or infinite."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % GROUP)])
    groups = padded.reshape(*x.shape[:-1], -1, GROUP)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    largest = jnp.where(jnp.any(jnp.isnan(groups), axis=-1), jnp.nan, largest)  # which XLA's maximum may lose
    scale = largest * np.float32(1 / 127)
    scale = jnp.where(scale < jnp.finfo(jnp.bfloat16).tiny, 0, scale)
    # Not a cast and back, which XLA takes for nothing on a GPU: the codes would be those of another scale.
    scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    step = scale[..., None]
    codes = jnp.where((step > 0) & jnp.isfinite(step), jnp.round(groups / step), 0).astype(jnp.int8)
    return codes.reshape(padded.shape)[..., : x.shape[-1]], scale.astype(jnp.bfloat16)


def dequantize_heads(side: Shaped[Array, "... H"], scale: Float[Array, "... G"] | None) -> Float[Array, "... H"]:
    """Keys or values of a cache in float32."""
    side = side.astype(jnp.float32)
    if scale is None:
        return side
    return side * jnp.repeat(scale.astype(jnp.float32), GROUP, axis=-1)[..., : side.shape[-1]]


def make_cache(config: ModelConfig, layer: int, batch: int, length: int, dtype: str) -> LayerCache:
    """The empty cache of a layer, for sequences of up to `length` positions."""
    seen = min(length, config.window(layer) or length)
    shape = (batch, seen + SPARE_SLOTS, config.num_kv_heads, config.head_dim)
    scales = (*shape[:-1], -(-config.head_dim // GROUP))
    arrays = [(shape, dtype)] * 2 + ([(scales, "bfloat16")] * 2 if dtype == "int8" else [])
    return LayerCache(*(jnp.zeros(*array) for array in arrays))


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
