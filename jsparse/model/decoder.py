"""The whole decoder: pure functions of (weights, tokens, caches)."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jsparse.model.cache import LayerCache
from jsparse.model.config import ModelConfig
from jsparse.model.executor import Executor
from jsparse.model.layers import Block, FeedForward, Span, apply
from jsparse.model.weights import Linear, Weights
from jsparse.typing import Array, Float, Int


class Decoder(nn.Module):
    """A causal language model. `apply(Decoder(config, executor), weights, ...)` runs it.

    The residual stream is float32 whatever the weights' dtype; `executor` does every matrix product.
    """

    config: ModelConfig
    executor: Executor

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        start: Int[Array, "B"],
        count: Int[Array, "B"],
        feed_forward: FeedForward,
        caches: tuple[LayerCache, ...],
        logits: Literal["last", "all", "none"] = "all",
    ) -> tuple[Float[Array, "B V"] | Float[Array, "B T V"] | None, tuple[LayerCache, ...], list[Any]]:
        """Logits, the caches grown by the tokens, and what `feed_forward` returned beside y per layer.

        Args:
          tokens: ids, of which the first `count` of each sequence exist.
          start: position of each sequence's first token.
          feed_forward: computes the FFN of a layer.
          caches: one per layer, with the positions before.
          logits: of each sequence's last token, of all tokens, or none.
        """
        c = self.config
        weights: Weights = self.get_variable("params", "weights")
        rows = self.executor.rows(weights.embed, tokens.reshape(-1))
        x = c.embed_scale * rows.reshape(*tokens.shape, c.hidden_size)
        span = Span.of(start, count, tokens.shape[1], c)
        new_caches, extras = [], []
        for layer, layer_weights in enumerate(weights.layers):
            block = Block(c, self.executor, layer, parent=None)
            x, cache, extra = apply(block, layer_weights, x, span, feed_forward, caches[layer])
            new_caches.append(cache)
            extras.append(extra)
        if logits == "none":
            return None, tuple(new_caches), extras
        if logits == "last":
            x = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        x = c.logit_scale * self.executor.norm(x, weights.norm, c.norm_eps)
        head = Linear(weights.embed if weights.head is None else weights.head)
        return self.executor.project(x, [head], split="vocab")[0], tuple(new_caches), extras
