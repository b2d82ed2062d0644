"""Log-probabilities of given text, token by token through the executor's sparse FFN."""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.checkpoints.open import DEFAULT_MODEL
from jsparse.executors.xla import activate, activate_up
from jsparse.model.cache import make_caches, wide_cache_dtype
from jsparse.model.config import ModelConfig
from jsparse.model.decoder import Decoder
from jsparse.model.executor import Executor
from jsparse.model.layers import apply
from jsparse.model.weights import Linear, Params, Predictor, Weights
from jsparse.typing import Array, Float, Int


def read_lines(name: str) -> list[dict[str, Any]]:
    """The entries of a .jsonl file that comes with the shipped model."""
    return [json.loads(line) for line in (DEFAULT_MODEL / name).read_text(encoding="utf-8").splitlines()]


def held_out_rows(params: Params, count: int, length: int | None = None) -> Int[np.ndarray, "count T"]:
    """Cut held-out code into up to `count` windows of `length` tokens, by default the context's.

    Each begins with the BOS token where the model has one.
    """
    config = params.config
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    width = (length or config.context_length) - len(bos)
    texts = [params.tokenizer.encode(entry["text"]) for entry in read_lines("held_out_code.jsonl")]
    texts = [text[len(bos) :] if list(text[: len(bos)]) == bos else text for text in texts]
    windows = [text[i : i + width] for text in texts for i in range(0, len(text) - width + 1, width)]
    rows = np.random.default_rng(0).permutation(np.asarray(windows, np.int64).reshape(-1, width))[:count]
    return np.concatenate([np.tile(np.asarray(bos, np.int64), (len(rows), 1)), rows], axis=1)


@partial(jax.jit, static_argnames=("config", "executor", "kv_dtype"))
def teacher_forced(
    weights: Weights,
    predictors: tuple[Predictor, ...] | None,
    row: Int[Array, "T"],
    config: ModelConfig,
    executor: Executor,
    kv_dtype: str | None = None,
) -> tuple[Float[Array, "T V"], Int[Array, "L 3"]]:
    """Log-probabilities after every token of a row, its FFNs sparse where there are predictors.

    Keys and values are stored in `kv_dtype`, or as `wide_cache_dtype` says.

    Returns:
      the log-probabilities, and of each layer the neurons predicted, those of them that are active, and all active
      ones; without predictors all three are the active ones.
    """
    spec = config.ffn_spec()

    def feed_forward(layer, x, ffn):
        flat = x[0]
        hidden = activate(spec, executor.project(flat, [Linear(ffn.gate)])[0], ffn.threshold)
        if ffn.up is not None:
            hidden = hidden * activate_up(spec, executor.project(flat, [Linear(ffn.up)])[0])
        active = jnp.sum(hidden != 0)
        if predictors is None:
            return executor.dense_ffn(x, ffn, spec), jnp.stack([active, active, active])
        y, counts = executor.sparse_ffn(flat, ffn, predictors[layer], spec)
        return y[None], jnp.append(jnp.sum(counts, axis=0), active)

    caches = make_caches(config, 1, row.size, kv_dtype or wide_cache_dtype(weights.embed))
    span = jnp.zeros(1, jnp.int32), jnp.full(1, row.size, jnp.int32)
    logits, _, counts = apply(Decoder(config, executor), weights, row[None], *span, feed_forward, caches)
    return jax.nn.log_softmax(logits[0]), jnp.stack(counts)
