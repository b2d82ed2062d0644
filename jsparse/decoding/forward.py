"""One pass of the decoder over new tokens."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jsparse.model.attention import KVCache
from jsparse.model.config import ModelConfig
from jsparse.model.decoder import Decoder
from jsparse.model.executor import Executor
from jsparse.model.ffn import FFNSpec
from jsparse.model.layers import apply
from jsparse.model.weights import Weights
from jsparse.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Model:
    """What a decode step needs besides arrays; static under jit."""

    config: ModelConfig
    executor: Executor
    spec: FFNSpec


def decode_step(
    weights: Weights,
    predictors: tuple[Any, ...] | None,
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    caches: tuple[KVCache, ...],
    model: Model,
) -> tuple[Float[Array, "B V"], tuple[KVCache, ...], Int[Array, "L B 2"]]:
    """Feed one token per sequence: logits for the next, the caches grown by it, and the executors' neuron counts.

    Weights and predictors are those of `Params`, or what the executor's `place` made of them. Without predictors the
    FFN is dense and the counts are zero.
    """

    def feed_forward(layer, x, ffn):
        x = x[:, 0]
        if predictors is None:
            return model.executor.dense_ffn(x, ffn, model.spec)[:, None], jnp.zeros((x.shape[0], 2), jnp.int32)
        y, counts = model.executor.sparse_ffn(x, ffn, predictors[layer], model.spec)
        return y[:, None], counts

    decoder = Decoder(model.config, model.executor)
    logits, caches, counts = apply(decoder, weights, token[:, None], position[:, None], feed_forward, caches=caches)
    return logits[:, 0], caches, jnp.stack(counts)
