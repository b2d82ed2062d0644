"""One pass of the decoder over new tokens."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jsparse.model.cache import LayerCache
from jsparse.model.config import ModelConfig
from jsparse.model.decoder import Decoder
from jsparse.model.executor import Executor
from jsparse.model.ffn import FFNSpec
from jsparse.model.layers import apply
from jsparse.model.weights import Weights
from jsparse.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Model:
    """What a pass needs besides arrays; static under jit."""

    config: ModelConfig
    executor: Executor
    spec: FFNSpec


def forward(
    weights: Weights,
    predictors: tuple[Any, ...] | None,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
    caches: tuple[LayerCache, ...],
    *,
    model: Model,
    logits: Literal["last", "all", "none"] = "last",
) -> tuple[Float[Array, "B V"] | Float[Array, "B T V"] | None, tuple[LayerCache, ...], Int[Array, "L B 2"]]:
    """Feed the next tokens of each sequence: one for a decode step, several for a prompt's chunk or a verification.

    Weights and predictors are those of `Params`, or what the executor's `place` made of them. Without predictors the
    FFN is dense and the counts are zero.

    Args:
      tokens: ids; of each sequence only the first `count` exist. The others write nothing to the caches, read no FFN
        row where the FFN is sparse, and their logits mean nothing. A count of 0 is an idle sequence.
      start: position of each sequence's first token; the caches hold those before it.
      caches: one per layer.
      logits: of each sequence's last token, of all tokens, or none.

    Returns:
      logits, the caches grown by the tokens, and the executors' neuron counts, summed over each sequence's tokens.
    """
    batch, length = tokens.shape
    exists = (jnp.arange(length) < count[:, None]).reshape(-1, 1).astype(jnp.float32)

    def feed_forward(layer, x, ffn):
        if predictors is None:
            return model.executor.dense_ffn(x, ffn, model.spec), jnp.zeros((batch, 2), jnp.int32)
        flat = x.reshape(batch * length, -1)
        y, counts = model.executor.sparse_ffn(flat, ffn, predictors[layer], model.spec, exists)
        return y.reshape(x.shape), jnp.sum(counts.reshape(batch, length, 2), axis=1)

    decoder = Decoder(model.config, model.executor)
    found, caches, counts = apply(decoder, weights, tokens, start, count, feed_forward, caches, logits)
    return found, caches, jnp.stack(counts)
