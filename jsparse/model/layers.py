"""The decoder's building blocks as Flax Linen modules: norm, rotary attention, residual block."""

from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jsparse.model.attention import KVCache, causal_attention
from jsparse.model.config import ModelConfig
from jsparse.model.weights import FFNWeights
from jsparse.typing import Array, Float, Int

_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


@runtime_checkable
class FeedForward(Protocol):
    """The FFN of one layer as the caller wants it computed.

    Given the layer's index, x (B, T, D) and the layer's weights, returns y (B, T, D) and any pytree of extras.
    """

    def __call__(self, layer: int, x: Float[Array, "B T D"], ffn: FFNWeights) -> tuple[Float[Array, "B T D"], Any]: ...


class Rotation(NamedTuple):
    """The rotary embedding at some positions: cosines and signed sines, computed once for all layers."""

    positions: Int[Array, "b T"]
    cos: Float[Array, "b T 1 H"]
    signed_sin: Float[Array, "b T 1 H"]

    @classmethod
    def of(cls, positions: Int[Array, "b T"], config: ModelConfig) -> "Rotation":
        angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        # Written to an array, or XLA computes them again for every element of every head in every layer.
        table = jnp.zeros((2, *positions.shape, 1, config.head_dim), jnp.float32)
        table = table.at[0].set(jnp.concatenate([cos, cos], axis=-1))
        return cls(positions, *table.at[1].set(jnp.concatenate([-sin, sin], axis=-1)))


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
        self, x: Float[Array, "B T D"], rotation: Rotation, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Without a cache attends within x and returns its keys and values; with one, T is 1 and the cache grows."""
        c = self.config

        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        sizes = {name: count * c.head_dim for name, count in heads.items()}
        weights = [parameter(self, f"{name}_proj", _init, (size, c.hidden_size)) for name, size in sizes.items()]
        projected = self.executor.linears(x, weights)
        if c.qkv_bias:
            biases = [parameter(self, f"{name}_bias", nn.initializers.zeros, (size,)) for name, size in sizes.items()]
            projected = [y + bias for y, bias in zip(projected, biases)]
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in projected)
        q, k = (rotate(y, rotation.cos, rotation.signed_sin) for y in (q, k))
        if cache is None:
            out, cache = causal_attention(q, k, v, c.sliding_window), (k, v)
        else:
            now = (q[:, 0], k[:, 0], v[:, 0], rotation.positions[:, 0])
            out, cache = self.executor.attend(*now, cache, c.sliding_window)
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
        rotation: Rotation,
        feed_forward: FeedForward,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, Any]:
        c = self.config
        normed = RMSNorm(c.hidden_size, c.norm_eps, name="input_norm")(x)
        attended, cache = Attention(c, self.executor, name="attention")(normed, rotation, cache)
        x = x + c.residual_scale * attended
        normed = RMSNorm(c.hidden_size, c.norm_eps, name="post_attention_norm")(x)
        ffn = parameter(self, "ffn", _init_ffn, (c.intermediate_size, c.hidden_size))
        y, extras = feed_forward(self.layer, normed, ffn)
        return x + c.residual_scale * y, cache, extras


def _init_ffn(key: Array, shape: tuple[int, int]) -> FFNWeights:
    gate, up, down = jax.random.split(key, 3)
    fan_out = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1)
    return FFNWeights(_init(gate, shape), _init(up, shape), fan_out(down, shape))


def rotate(
    x: Float[Array, "B T n H"], cos: Float[Array, "b T 1 H"], signed_sin: Float[Array, "b T 1 H"]
) -> Float[Array, "B T n H"]:
    """Rotary position embedding in the half-split layout of the Llama checkpoints."""
    # Halves change places by an index, which XLA for GPUs makes part of the product; a roll is a kernel of its own.
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return x * cos + halves[..., ::-1, :].reshape(x.shape) * signed_sin


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
