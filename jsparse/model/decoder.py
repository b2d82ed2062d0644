"""The whole decoder: pure functions of (weights, tokens, cache)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jsparse.model.attention import KVCache
from jsparse.model.config import ModelConfig
from jsparse.model.executor import Executor
from jsparse.model.layers import Block, FeedForward, Rotation, apply, rms_norm
from jsparse.model.weights import Linear, Weights
from jsparse.typing import Array, Float, Int


class Decoder(nn.Module):
    """A causal language model. `apply(Decoder(config, executor), weights, ...)` runs it.

    The residual stream is float32 whatever the weights' dtype; `executor` does every matrix product outside the
    attention of a prefill.
    """

    config: ModelConfig
    executor: Executor

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "b T"],
        feed_forward: FeedForward,
        caches: tuple[KVCache, ...] | None = None,
        last: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"] | Float[Array, "B T V"], tuple[KVCache, ...], list[Any]]:
        """Logits, keys and values per layer, and what `feed_forward` returned beside y per layer.

        Args:
          tokens: ids.
          positions: their positions; the leading axis is 1 where all sequences share them.
          feed_forward: computes the FFN of a layer.
          caches: one per layer for a decode step, where T is 1; None for a whole sequence.
          last: if given, only the logits of this token of each sequence are computed.
        """
        c = self.config
        weights: Weights = self.get_variable("params", "weights")
        rows = self.executor.rows(weights.embed, tokens.reshape(-1))
        x = c.embed_scale * rows.reshape(*tokens.shape, c.hidden_size)
        rotation = Rotation.of(positions, c)
        new_caches, extras = [], []
        for layer, layer_weights in enumerate(weights.layers):
            cache = caches[layer] if caches is not None else None
            block = Block(c, self.executor, layer, parent=None)
            x, cache, extra = apply(block, layer_weights, x, rotation, feed_forward, cache)
            new_caches.append(cache)
            extras.append(extra)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        x = c.logit_scale * rms_norm(x, weights.norm, c.norm_eps)
        head = Linear(weights.embed if weights.head is None else weights.head)
        return self.executor.project(x, [head], split="vocab")[0], tuple(new_caches), extras
