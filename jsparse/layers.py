"""The decoder's building blocks as Flax Linen modules: norm, rotary attention, residual block."""

from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jsparse.config import ModelConfig
from jsparse.params import FFNWeights
from jsparse.typing import Array, Bool, Float, Int

KVCache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
"""Keys and values of one layer. Slot s holds the newest position p with p % S == s, so a cache no longer than the
sliding window is a ring buffer."""

_QUERY_BLOCK = 512
_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


@runtime_checkable
class FeedForward(Protocol):
    """The FFN of one layer as the caller wants it computed.

    Given the layer's index, x (B, T, D) and the layer's weights, returns y (B, T, D) and any pytree of extras.
    """

    def __call__(self, layer: int, x: Float[Array, "B T D"], ffn: FFNWeights) -> tuple[Float[Array, "B T D"], Any]: ...


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Any:
    """A parameter of a module, made by `init(key, shape)` where the module is being initialised.

    Linen's own lookup compares shapes leaf by leaf and so refuses quantised matrices; shapes are checked where a
    checkpoint is loaded.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape)


class RMSNorm(nn.Module):
    size: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = parameter(self, "scale", nn.initializers.ones, (self.size,))
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale.astype(jnp.float32)


class Attention(nn.Module):
    """Causal attention with rotary positions, grouped key/value heads and an optional sliding window."""

    config: ModelConfig
    executor: ModuleType

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "b T"], cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Without a cache attends within x and returns its keys and values; with one, T is 1 and the cache grows."""
        c = self.config

        def project(name, heads):
            weight = parameter(self, f"{name}_proj", _init, (heads * c.head_dim, c.hidden_size))
            bias = parameter(self, f"{name}_bias", nn.initializers.zeros, (heads * c.head_dim,)) if c.qkv_bias else None
            y = self.executor.linear(x, weight)
            y = y if bias is None else y + bias
            return y.reshape(*x.shape[:2], heads, c.head_dim)

        q, k, v = project("q", c.num_heads), project("k", c.num_kv_heads), project("v", c.num_kv_heads)
        q, k = rotate(q, positions, c), rotate(k, positions, c)
        if cache is None:
            out, cache = causal_attention(q, k, v, c.sliding_window), (k, v)
        else:
            cache = write_cache(cache, k, v, positions[:, 0])
            mask = visible_slots(positions[:, 0], cache[0].shape[1], c.sliding_window)
            keys, values = (side.astype(q.dtype) for side in cache)
            out = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None, None, :])
        weight = parameter(self, "o_proj", _init, (c.hidden_size, c.num_heads * c.head_dim))
        return self.executor.linear(out.reshape(*x.shape[:2], -1), weight), cache


class Block(nn.Module):
    """One layer: attention and FFN, each behind a norm and added to the residual stream."""

    config: ModelConfig
    executor: ModuleType
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "b T"],
        feed_forward: FeedForward,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, Any]:
        c = self.config
        normed = RMSNorm(c.hidden_size, c.norm_eps, name="input_norm")(x)
        attended, cache = Attention(c, self.executor, name="attention")(normed, positions, cache)
        x = x + c.residual_scale * attended
        normed = RMSNorm(c.hidden_size, c.norm_eps, name="post_attention_norm")(x)
        ffn = parameter(self, "ffn", _init_ffn, (c.intermediate_size, c.hidden_size))
        y, extras = feed_forward(self.layer, normed, ffn)
        return x + c.residual_scale * y, cache, extras


def _init_ffn(key: Array, shape: tuple[int, int]) -> FFNWeights:
    gate, up, down = jax.random.split(key, 3)
    fan_out = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1)
    return FFNWeights(_init(gate, shape), _init(up, shape), fan_out(down, shape))


def rotate(x: Float[Array, "B T n H"], positions: Int[Array, "b T"], config: ModelConfig) -> Float[Array, "B T n H"]:
    """Rotary position embedding in the half-split layout of the Llama checkpoints."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angular frequencies (H / 2,) in radians per position, float32, with the config's rope scaling applied."""
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None:
        # Llama 3: keep short wavelengths, stretch long ones by `factor`, interpolate between.
        turns = scaling.original_context_length * frequencies / (2 * np.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0, 1)
        frequencies = frequencies * (keep + (1 - keep) / scaling.factor)
    return frequencies.astype(np.float32)


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
        return jax.nn.dot_product_attention(queries, k, v, mask=mask[None, None])

    if length <= _QUERY_BLOCK or length % _QUERY_BLOCK:
        return attend(0, q)
    blocks = q.reshape(q.shape[0], -1, _QUERY_BLOCK, *q.shape[2:]).swapaxes(0, 1)
    starts = jnp.arange(blocks.shape[0]) * _QUERY_BLOCK
    out = jax.lax.map(lambda block: attend(*block), (starts, blocks))
    return out.swapaxes(0, 1).reshape(q.shape)


def fill_cache(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], lengths: Int[Array, "B"], slots: int, dtype
) -> KVCache:
    """The cache of `slots` slots after a right-padded prompt whose true lengths are given."""
    newest = lengths[:, None] - 1
    position = newest - (newest - jnp.arange(slots)) % slots
    position = jnp.clip(position, 0, k.shape[1] - 1)[:, :, None, None]
    return tuple(jnp.take_along_axis(side, position, axis=1).astype(dtype) for side in (k, v))


def write_cache(
    cache: KVCache, k: Float[Array, "B one K H"], v: Float[Array, "B one K H"], position: Int[Array, "B"]
) -> KVCache:
    """The cache with one token per sequence written at its position."""
    rows, slot = jnp.arange(k.shape[0]), position % cache[0].shape[1]
    return tuple(side.at[rows, slot].set(new[:, 0].astype(side.dtype)) for side, new in zip(cache, (k, v)))


def visible_slots(position: Int[Array, "B"], slots: int, window: int | None) -> Bool[Array, "B S"]:
    """Which slots the token at `position`, already written, may attend to."""
    age = (position[:, None] - jnp.arange(slots)) % slots
    visible = age <= position[:, None]
    return visible if window is None else visible & (age < window)
