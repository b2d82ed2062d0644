"""The decoder's building blocks: rotary embedding, and as Flax Linen modules attention and residual block."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jsparse.model.cache import LayerCache
from jsparse.model.config import ModelConfig
from jsparse.model.executor import Executor
from jsparse.model.weights import AttentionWeights, FFNWeights, Layer
from jsparse.typing import Array, Float, Int

_LARGE_BIAS = 8.0
"""Keys have about this range without their biases."""


@runtime_checkable
class FeedForward(Protocol):
    """The FFN of one layer as the caller wants it computed.

    Given the layer's index, x (B, T, D) and the layer's weights, returns y (B, T, D) and any pytree of extras.
    """

    def __call__(self, layer: int, x: Float[Array, "B T D"], ffn: FFNWeights) -> tuple[Float[Array, "B T D"], Any]: ...


class Rotation(NamedTuple):
    """The rotary embedding at some positions: cosines and signed sines, computed once for all layers."""

    cos: Float[Array, "B T 1 H"]
    signed_sin: Float[Array, "B T 1 H"]

    @classmethod
    def of(cls, positions: Int[Array, "B T"], config: ModelConfig) -> "Rotation":
        angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        # Written to an array, or XLA computes them again for every element of every head in every layer.
        table = jnp.zeros((2, *positions.shape, 1, config.head_dim), jnp.float32)
        table = table.at[0].set(jnp.concatenate([cos, cos], axis=-1))
        return cls(*table.at[1].set(jnp.concatenate([-sin, sin], axis=-1)))


class Span(NamedTuple):
    """Where the new tokens of each sequence stand: `count` of them from position `start` on."""

    start: Int[Array, "B"]
    count: Int[Array, "B"]
    rotation: Rotation

    @classmethod
    def of(cls, start: Int[Array, "B"], count: Int[Array, "B"], length: int, config: ModelConfig) -> "Span":
        return cls(start, count, Rotation.of(start[:, None] + jnp.arange(length), config))


def apply(module: nn.Module, weights: Any, *args: Any, **options: Any) -> Any:
    """Run a module on its weights, which Linen holds as one leaf: their names and shapes are the table's affair."""
    return module.apply({"params": {"weights": weights}}, *args, **options)


class Attention(nn.Module):
    """Causal attention with rotary positions, grouped key/value heads and an optional sliding window."""

    config: ModelConfig
    executor: Executor
    layer: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], span: Span, cache: LayerCache
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Attention of the new tokens over the cache, which takes them first."""
        c = self.config
        weights: AttentionWeights = self.get_variable("params", "weights")
        inputs = (weights.q, weights.k, weights.v)
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in self.executor.project(x, inputs))
        if c.has_rotation(self.layer):
            q, k = (rotate(y, *span.rotation) for y in (q, k))
        if cache.key_scale is not None and weights.k.bias is not None:
            q, k = shrink_large_biases(q, k, weights.k.bias)
        out, cache = self.executor.attend(q, k, v, span.start, span.count, cache, c.window(self.layer))
        return self.executor.project(out.reshape(*x.shape[:2], -1), [weights.o], split="in")[0], cache


class Block(nn.Module):
    """One layer: attention and FFN, each behind a norm and added to the residual stream."""

    config: ModelConfig
    executor: Executor
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        span: Span,
        feed_forward: FeedForward,
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T D"], LayerCache, Any]:
        c = self.config
        weights: Layer = self.get_variable("params", "weights")
        normed = self.executor.norm(x, weights.input_norm, c.norm_eps)
        attention = Attention(c, self.executor, self.layer, parent=None)
        attended, cache = apply(attention, weights.attention, normed, span, cache)
        x = x + c.residual_scale * attended
        normed = self.executor.norm(x, weights.post_attention_norm, c.norm_eps)
        y, extras = feed_forward(self.layer, normed, weights.ffn)
        return x + c.residual_scale * y, cache, extras


def rotate(
    x: Float[Array, "B T n H"], cos: Float[Array, "B T 1 H"], signed_sin: Float[Array, "B T 1 H"]
) -> Float[Array, "B T n H"]:
    """Rotary position embedding in the half-split layout of the Llama checkpoints."""
    # Halves change places by an index, which XLA for GPUs makes part of the product; a roll is a kernel of its own.
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return x * cos + halves[..., ::-1, :].reshape(x.shape) * signed_sin


def shrink_large_biases(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], bias: Float[Array, "KH"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Scale queries and keys so that no bias of a key exceeds twice `_LARGE_BIAS`; their products stay, to the bit.

    Channels of a key in few bits share a scale, and a bias of 100 in one would leave the others few levels. So such a
    channel, and the one that the rotary embedding turns into it, is divided by a power of two, by which the queries are
    multiplied.
    """
    kv_heads = k.shape[2]
    pairs = jnp.max(jnp.abs(bias).reshape(kv_heads, 2, -1), axis=1)
    _, exponent = jnp.frexp(pairs / _LARGE_BIAS)
    factor = jnp.ldexp(np.float32(1), jnp.maximum(exponent - 1, 0))
    factor = jnp.concatenate([factor, factor], axis=-1)
    return q * jnp.repeat(factor, q.shape[2] // kv_heads, axis=0), k / factor


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
