"""The decoder's building blocks: norm, rotary embedding, and as Flax Linen modules attention and residual block."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jsparse.model.attention import KVCache, causal_attention
from jsparse.model.config import ModelConfig
from jsparse.model.executor import Executor
from jsparse.model.weights import AttentionWeights, FFNWeights, Layer
from jsparse.typing import Array, Float, Int


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


def apply(module: nn.Module, weights: Any, *args: Any, **options: Any) -> Any:
    """Run a module on its weights, which Linen holds as one leaf: their names and shapes are the table's affair."""
    return module.apply({"params": {"weights": weights}}, *args, **options)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x over its root mean square, in float32, times the scale."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale.astype(jnp.float32)


class Attention(nn.Module):
    """Causal attention with rotary positions, grouped key/value heads and an optional sliding window."""

    config: ModelConfig
    executor: Executor

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], rotation: Rotation, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Without a cache attends within x and returns its keys and values; with one, T is 1 and the cache grows."""
        c = self.config
        weights: AttentionWeights = self.get_variable("params", "weights")
        inputs = (weights.q, weights.k, weights.v)
        q, k, v = (y.reshape(*x.shape[:2], -1, c.head_dim) for y in self.executor.project(x, inputs))
        q, k = (rotate(y, rotation.cos, rotation.signed_sin) for y in (q, k))
        if cache is None:
            out, cache = causal_attention(q, k, v, c.sliding_window), (k, v)
        else:
            now = (q[:, 0], k[:, 0], v[:, 0], rotation.positions[:, 0])
            out, cache = self.executor.attend(*now, cache, c.sliding_window)
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
        rotation: Rotation,
        feed_forward: FeedForward,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache, Any]:
        c = self.config
        weights: Layer = self.get_variable("params", "weights")
        normed = rms_norm(x, weights.input_norm, c.norm_eps)
        attended, cache = apply(Attention(c, self.executor, parent=None), weights.attention, normed, rotation, cache)
        x = x + c.residual_scale * attended
        y, extras = feed_forward(self.layer, rms_norm(x, weights.post_attention_norm, c.norm_eps), weights.ffn)
        return x + c.residual_scale * y, cache, extras


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
