"""Fitting predictors: calibration tokens stream through the decoder, one layer at a time.

Only one layer's activations are held. The first half of the sequences gives the data's metric for the SVD, the second
half the thresholds. The first position of a sequence is left out of both: it is the attention sink, whose activations
are like no other token's, and it is never decoded sparsely.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import Matrix, dequantize, take_rows
from jsparse.errors import JsparseError
from jsparse.executors.xla import Xla, activate, activate_up, linear
from jsparse.model.cache import make_cache, wide_cache_dtype
from jsparse.model.config import ModelConfig
from jsparse.model.ffn import FFNSpec
from jsparse.model.layers import Block, Span, apply
from jsparse.model.weights import FFNWeights, Layer, Params, Predictor
from jsparse.predictors.options import CalibrationOptions, LayerReport
from jsparse.predictors.state import CalibrationState
from jsparse.predictors.svd import fit_low_bit
from jsparse.predictors.thresholds import fit_bias
from jsparse.typing import Array, Bool, Float, Int

MAX_SEQUENCE = 512
_NEURON_BLOCK = 128
_TOKEN_BLOCK = 2048
_LEVELS = 256
_CAUTIOUS_LAYERS, _CAUTION = 2, 0.1


def make_rows(params: Params, texts: Sequence[Any] | str, options: CalibrationOptions) -> Int[np.ndarray, "rows T"]:
    """Calibration sequences of equal length: the texts one after another, cut, each behind the bos token.

    Raises:
      JsparseError: there is too little text, or an id is outside the vocabulary.
    """
    config = params.config
    if reason := config.unimplemented():
        raise JsparseError(f"this model cannot be calibrated: {reason}")
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list | tuple) and not (isinstance(texts, np.ndarray) and texts.ndim):
        raise JsparseError(f"texts is of type {type(texts).__name__}; it must be a text or a list of texts")
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    stream = np.concatenate([np.zeros(0, np.int64), *(_to_ids(params, text) for text in texts)])
    if np.any((stream < 0) | (stream >= config.vocab_size)):
        raise JsparseError(f"calibration token ids must be 0 to {config.vocab_size - 1}, the model's vocabulary")
    needed = 4 * max(options.ranks(config))
    usable = min(stream.size, options.tokens)
    if usable < needed:
        raise JsparseError(
            f"calibration has {usable} tokens; rank {max(options.ranks(config))} needs at least {needed}: give more "
            "text, raise tokens, or lower the rank"
        )
    width = max(1, min(MAX_SEQUENCE - len(bos), config.context_length - len(bos), usable // 8))
    cut = stream[: stream.size // width * width].reshape(-1, width)
    chosen = np.random.default_rng(options.seed).permutation(len(cut))[: max(2, usable // width)]
    return np.concatenate([np.tile(np.array(bos, np.int64), (len(chosen), 1)), cut[chosen]], axis=1).astype(np.int32)


def fit_layers(
    params: Params, rows: Int[np.ndarray, "rows T"], options: CalibrationOptions, state_dir: str | Path | None = None
) -> Iterator[tuple[Predictor, LayerReport]]:
    """The predictor and report of each layer, in order; finished layers in `state_dir` are not fitted again.

    Raises:
      JsparseError: activations are not finite, or `state_dir` belongs to another calibration.
    """
    config = params.config
    state = CalibrationState(state_dir, params, rows, options) if state_dir else None
    first, hidden = state.resume() if state else (0, None)
    for layer in range(first):
        yield state.read_layer(layer)
    if hidden is None:
        embed = take_rows(params.weights.embed, jnp.asarray(rows.reshape(-1)))
        hidden = np.array(config.embed_scale * embed).reshape(*rows.shape, -1)
        del embed
    dtype = wide_cache_dtype(params.weights.embed)
    for layer in range(first, config.num_layers):
        block = params.weights.layers[layer]
        inputs = _run_block(block, hidden, config, layer, dtype)
        predictor, report = fit_layer(block.ffn, inputs, config, options, layer)
        del inputs
        if state:
            state.write_layer(layer, predictor, report, hidden)
        yield predictor, report


def fit_layer(
    ffn: FFNWeights,
    inputs: Float[np.ndarray, "rows T D"],
    config: ModelConfig,
    options: CalibrationOptions,
    layer: int,
) -> tuple[Predictor, LayerReport]:
    """The predictor of one layer from its FFN inputs: the first half of the rows for a and b, the rest for bias."""
    half, width = len(inputs) // 2, inputs.shape[-1]
    a, b, offset = _fit_factors(ffn, inputs[:half].reshape(-1, width), config, options, layer)
    found = _statistics(ffn, jnp.asarray(inputs[half:].reshape(-1, width)), a, b, offset, config, options)
    return _with_thresholds(a, b, offset, found, config, options, layer)


def _fit_factors(
    ffn: FFNWeights, x: Float[np.ndarray, "n D"], config: ModelConfig, options: CalibrationOptions, layer: int
) -> tuple[Matrix, Matrix, Float[Array, "F"]]:
    """a, b and what is added to their scores before any threshold."""
    a, b, offset = fit_low_bit(
        dequantize(ffn.gate),
        x,
        options.ranks(config)[layer],
        bits=options.bits,
        whiten=options.whiten,
        center=options.center,
        refit=options.refit,
        threshold=config.ffn_threshold,
    )
    # A threshold per neuron absorbs it.
    return a, b, jnp.zeros_like(offset) if options.bias == "neuron" else offset


class _Statistics(NamedTuple):
    """Of every neuron and token (F, n): its score, what skipping it costs, and whether it is active."""

    scores: Float[np.ndarray, "F n"]
    cost: Float[np.ndarray, "F n"]
    active: Bool[np.ndarray, "F n"]


def _statistics(
    ffn: FFNWeights,
    x: Float[Array, "n D"],
    a: Matrix,
    b: Matrix,
    offset: Float[Array, "F"],
    config: ModelConfig,
    options: CalibrationOptions,
) -> _Statistics:
    features, shape = linear(x, a), (config.intermediate_size, x.shape[0])
    found = _Statistics(np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, bool))
    for start in range(0, config.intermediate_size, _NEURON_BLOCK):
        block = slice(start, min(start + _NEURON_BLOCK, config.intermediate_size))
        neurons = jnp.arange(block.start, block.stop)
        some = _block_statistics(x, features, ffn, b, offset, neurons, config.ffn_spec(), options.importance)
        for every, of_block in zip(found, some):
            every[block] = of_block
    return found


def _with_thresholds(
    a: Matrix,
    b: Matrix,
    offset: Float[Array, "F"],
    found: _Statistics,
    config: ModelConfig,
    options: CalibrationOptions,
    layer: int,
) -> tuple[Predictor, LayerReport]:
    """The predictor whose thresholds skip what costs least, and what it does on these tokens."""
    scores, cost, active = found
    sparsity = 1 - np.count_nonzero(active) / active.size
    target = max(0.0, (options.sparsity - (_CAUTION if layer < _CAUTIOUS_LAYERS else 0)) * sparsity)
    fit = fit_bias(scores, cost, target, levels=_LEVELS, mode=options.bias, silenced=options.silenced)
    # Without calibration a neuron is predicted active where its estimated gate passes the activation's threshold.
    bias = fit.bias if options.bias != "none" else fit.bias - config.ffn_threshold
    predicted = scores > -np.asarray(bias)[:, None]
    num_active = np.count_nonzero(active)
    recall = np.count_nonzero(predicted & active) / num_active if num_active else 1.0
    skipped = 1 - np.count_nonzero(predicted) / active.size
    report = LayerReport(layer, a.shape[0], sparsity, skipped, recall, fit.stopped_early)
    rate = jnp.asarray(active.mean(axis=1, dtype=np.float64), jnp.float32)
    return Predictor(a, b, (bias + offset).astype(jnp.float32), rate), report


@partial(jax.jit, static_argnames=("spec", "importance"))
def _block_statistics(
    x: Float[Array, "n D"],
    features: Float[Array, "n R"],
    ffn: FFNWeights,
    b: Matrix,
    offset: Float[Array, "F"],
    neurons: Int[Array, "block"],
    spec: FFNSpec,
    importance: str,
):
    """Scores, cost of skipping, and activity (block, n) of some neurons."""
    scores = linear(take_rows(b, neurons), features) + offset[neurons][:, None]
    gate = activate(spec, linear(take_rows(ffn.gate, neurons), x), ffn.threshold[neurons][:, None])
    hidden = gate
    if ffn.up is not None:
        hidden = gate * activate_up(spec, linear(take_rows(ffn.up, neurons), x))
    norm = jnp.linalg.norm(take_rows(ffn.down_t, neurons), axis=1)[:, None]
    cost = {"gate": gate, "hidden": hidden, "output": hidden * norm}[importance] ** 2
    return scores, cost, hidden != 0


@partial(jax.jit, static_argnames=("config", "layer", "dtype"))
def _block_step(block, hidden, config, layer, dtype):
    def feed_forward(_, x, ffn):
        return Xla().dense_ffn(x, ffn, config.ffn_spec()), x

    batch, length = hidden.shape[:2]
    span = Span.of(jnp.zeros(batch, jnp.int32), jnp.full(batch, length), length, config)
    cache = make_cache(config, layer, batch, length, dtype)
    out, _, inputs = apply(Block(config, Xla(), layer), block, hidden, span, feed_forward, cache)
    return out, inputs


def _run_block(
    block: Layer, hidden: Float[np.ndarray, "rows T D"], config: ModelConfig, layer: int, dtype: str
) -> Float[np.ndarray, "rows t D"]:
    """Replace `hidden` by the layer's output; returns the layer's FFN inputs without the first position."""
    inputs = np.empty((hidden.shape[0], max(1, hidden.shape[1] - 1), hidden.shape[2]), np.float32)
    size = max(1, _TOKEN_BLOCK // hidden.shape[1])
    # One program for all layers whose attention is alike.
    kinds = [(config.window(each), config.has_rotation(each)) for each in range(config.num_layers)]
    alike = kinds.index(kinds[layer])
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        hidden[rows], x = _block_step(block, hidden[rows], config, alike, dtype)
        inputs[rows] = x[:, -inputs.shape[1] :]
    if not (np.isfinite(hidden).all() and np.isfinite(inputs).all()):
        raise JsparseError(f"layer {layer} gives NaN or infinite activations; the checkpoint's weights are damaged")
    return inputs


def _to_ids(params: Params, text: Any) -> np.ndarray:
    is_chat = isinstance(text, list | tuple) and bool(text) and all(isinstance(message, dict) for message in text)
    if isinstance(text, str) or is_chat:
        if params.tokenizer is None:
            raise JsparseError("this model has no tokenizer; give calibration texts as arrays of token ids")
        if not is_chat:
            return np.asarray(params.tokenizer.encode(text, special_tokens=False), np.int64)
        answered = text[-1].get("role") == "assistant"
        ids = params.tokenizer.encode_chat(text, add_generation_prompt=not answered)
        return np.asarray(ids[ids[:1] == [params.config.bos_token_id] :], np.int64)
    try:
        ids = np.asarray(text)
    except ValueError:  # lists of different lengths
        ids = np.asarray(None)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise JsparseError(f"a calibration text must be a string, a chat or a 1-D array of token ids, not {type(text)}")
    return ids.astype(np.int64)
