"""The whole decoder: pure functions of (weights, tokens, cache)."""

from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jsparse.arrays import Matrix, QuantizedRows
from jsparse.errors import JsparseError
from jsparse.executors import xla
from jsparse.model.attention import KVCache
from jsparse.model.config import ModelConfig
from jsparse.model.layers import Block, FeedForward, RMSNorm, Rotation, parameter
from jsparse.typing import Array, Float, Int

_init_embed = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    """A causal language model. `Decoder(config, executor).apply({"params": weights}, ...)` runs it.

    The residual stream is float32 whatever the weights' dtype; `executor` is a module of `jsparse.executors` and does
    every matrix product outside the attention of a prefill.
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
        x = c.embed_scale * self.executor.take_rows(embed, tokens.reshape(-1)).reshape(*tokens.shape, c.hidden_size)
        rotation = Rotation.of(positions, c)
        new_caches, extras = [], []
        for layer in range(c.num_layers):
            block = Block(c, self.executor, layer, name=f"layers_{layer}")
            x, cache, extra = block(x, rotation, feed_forward, caches[layer] if caches is not None else None)
            new_caches.append(cache)
            extras.append(extra)
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        x = c.logit_scale * RMSNorm(c.hidden_size, c.norm_eps, name="norm")(x)
        head: Matrix = (
            embed if c.tie_embeddings else parameter(self, "lm_head", _init_embed, (c.vocab_size, c.hidden_size))
        )
        return self.executor.linear(x, head), tuple(new_caches), extras


def weight_shapes(config: ModelConfig) -> dict[str, Any]:
    """The structure of `Params.weights`, with a `jax.ShapeDtypeStruct` for every matrix and vector."""
    token = jnp.zeros((1, 1), jnp.int32)

    def initialise(key):
        return Decoder(config, xla).init(key, token, token, lambda layer, x, ffn: (x, None))["params"]

    return jax.eval_shape(initialise, jax.random.key(0))


def check_weights(weights: dict[str, Any], config: ModelConfig) -> None:
    """Raises: JsparseError: weights are missing, unknown or of another shape than the config's; all are listed."""

    def shapes(tree):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, QuantizedRows))
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    wanted, found = shapes(weight_shapes(config)), shapes(weights)
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {found[name]}, expected {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise JsparseError(f"the weights do not fit the config: {'; '.join(sorted(problems)[:5])}{more}")
