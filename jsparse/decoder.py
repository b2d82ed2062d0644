"""The whole decoder: pure functions of (weights, tokens, cache)."""

from types import ModuleType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jsparse.config import ModelConfig
from jsparse.layers import Block, FeedForward, KVCache, RMSNorm, parameter
from jsparse.quantization import Matrix, take_rows
from jsparse.typing import Array, Float, Int

_init_embed = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    """A causal language model. `Decoder(config, executor).apply({"params": weights}, ...)` runs it.

    The residual stream is float32 whatever the weights' dtype; `executor` is a module of `jsparse.ffn` and computes
    every matrix product outside attention.
    """

    config: ModelConfig
    executor: ModuleType

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
        embed = parameter(self, "embed", _init_embed, (c.vocab_size, c.hidden_size))
        x = c.embed_scale * take_rows(embed, tokens.reshape(-1)).reshape(*tokens.shape, c.hidden_size)
        new_caches, extras = [], []
        for layer in range(c.num_layers):
            block = Block(c, self.executor, layer, name=f"layers_{layer}")
            x, cache, extra = block(x, positions, feed_forward, caches[layer] if caches is not None else None)
            new_caches.append(cache)
            extras.append(extra)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        x = c.logit_scale * RMSNorm(c.hidden_size, c.norm_eps, name="norm")(x)
        head: Matrix = (
            embed if c.tie_embeddings else parameter(self, "lm_head", _init_embed, (c.vocab_size, c.hidden_size))
        )
        return self.executor.linear(x, head), tuple(new_caches), extras
