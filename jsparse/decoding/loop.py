"""Decoding: a dense pass over the prompts, and the jitted loop that runs many sparse steps."""

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.decoding.forward import Model, decode_step
from jsparse.decoding.sampling import Sampling, greedy, sample
from jsparse.decoding.statistics import PAD, Statistics
from jsparse.errors import JsparseError
from jsparse.model.attention import KVCache, fill_cache
from jsparse.model.decoder import Decoder
from jsparse.model.executor import Executor
from jsparse.model.layers import apply
from jsparse.model.weights import Params, Weights
from jsparse.typing import Array, Bool, Float, Int, Shaped

CHUNK = 32
"""Most decode steps per call of the jitted loop."""
_HEADROOM = 4
"""Times the largest key or value of the prompts that a cache must hold."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("caches", "token", "position", "finished", "finite", "keys"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that changes from step to step.

    Attributes:
      caches: keys and values per layer.
      token: (B,) the newest token, not yet fed to the model.
      position: (B,) that token's position.
      finished: (B,) sequences that have ended.
      finite: (B,) sequences whose logits have been finite so far.
      keys: (B,) random keys.
    """

    caches: tuple[KVCache, ...]
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    finished: Bool[Array, "B"]
    finite: Bool[Array, "B"]
    keys: Shaped[Array, "B"]


@partial(jax.jit, static_argnames=("model", "slots", "cache_dtype"))
def prefill(
    weights: Weights,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Shaped[Array, "B"],
    sampling: Sampling,
    *,
    model: Model,
    slots: int,
    cache_dtype: str,
) -> tuple[DecodeState, Float[Array, ""]]:
    """Run right-padded prompts densely, fill caches of `slots` slots and choose the first token of each sequence.

    Returns:
      the state, and the largest magnitude of a key or value of the prompts.
    """

    def feed_forward(layer, x, ffn):
        return model.executor.dense_ffn(x, ffn, model.spec), None

    positions = jnp.arange(tokens.shape[1])[None]
    decoder = Decoder(model.config, model.executor)
    logits, keys_values, _ = apply(decoder, weights, tokens, positions, feed_forward, last=lengths - 1)
    caches = tuple(fill_cache(k, v, lengths, slots, jnp.dtype(cache_dtype)) for k, v in keys_values)
    token, keys = _choose(logits, keys, sampling)
    ends = _ends(token, lengths, sampling, model.config)
    is_prompt = (jnp.arange(tokens.shape[1]) < lengths[:, None])[:, :, None, None]
    largest = jnp.max(jnp.stack([jnp.max(jnp.where(is_prompt, jnp.abs(s), 0)) for pair in keys_values for s in pair]))
    return DecodeState(caches, token, lengths, ends, _are_finite(logits), keys), largest


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode_chunk(
    weights: Weights,
    predictors: tuple[Any, ...] | None,
    state: DecodeState,
    sampling: Sampling,
    num_steps: Int[Array, ""],
    *,
    model: Model,
) -> tuple[DecodeState, Int[Array, "B chunk"], Int[Array, "L 2"]]:
    """Up to num_steps (at most CHUNK) decode steps in one device program; it ends when every sequence has.

    Returns:
      the state, the chosen tokens with PAD after a sequence's end, and the counts summed over the steps of
      sequences that had not ended.
    """

    def step(carry):
        i, state, tokens, counts = carry
        logits, caches, step_counts = decode_step(weights, predictors, state.token, state.position, state.caches, model)
        fits = _are_finite(logits) & _hold(caches, state.position)
        chosen, keys = _choose(logits, state.keys, sampling)
        finite = state.finite & (state.finished | fits)
        ended = state.finished | ~finite
        tokens = tokens.at[:, i].set(jnp.where(ended, PAD, chosen))
        counts = counts + jnp.sum(jnp.where(ended[:, None], 0, step_counts), axis=1)
        position = state.position + 1
        finished = ended | _ends(chosen, position, sampling, model.config)
        state = DecodeState(caches, chosen, position, finished, finite, keys)
        return i + 1, state, tokens, counts

    def unfinished(carry):
        return (carry[0] < num_steps) & ~jnp.all(carry[1].finished)

    tokens = jnp.full((state.token.size, CHUNK), PAD, jnp.int32)
    counts = jnp.zeros((model.config.num_layers, 2), jnp.int32)
    _, state, tokens, counts = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, tokens, counts))
    return state, tokens, counts


def _choose(logits, keys, sampling):
    if sampling.is_greedy:
        return greedy(logits), keys
    keys, draws = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return sample(logits, draws, sampling.temperature, sampling.top_k, sampling.top_p), keys


_choose_jit = jax.jit(_choose)


def _are_finite(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    return jnp.all(jnp.isfinite(logits), axis=-1)


def _hold(caches: tuple[KVCache, ...], position: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether the caches hold what was written at the position: float16 makes infinity of what is beyond it, and
    attention then passes over a key without a trace in the logits."""
    held = jnp.ones(position.shape, bool)
    for side in (side for cache in caches for side in cache if side.dtype == jnp.float16):
        newest = side[jnp.arange(position.size), position % side.shape[1]]
        held &= jnp.all(jnp.isfinite(newest), axis=(1, 2))
    return held


def _ends(token, position, sampling, config):
    """Whether a sequence ends with this token: it is an end-of-text token, or the context is full."""
    return jnp.isin(token, sampling.eos_ids) | (position + 1 >= config.context_length)


def bucket(length: int) -> int:
    """The padded length: the next power of two from 32 to 512, then the next multiple of 512."""
    if length > 512:
        return -(-length // 512) * 512
    return max(32, 1 << (length - 1).bit_length())


class JittedLoop:
    """The decode loop in JAX: chunks of `decode_chunk` over one state."""

    def __init__(
        self, model: Model, weights: Weights, predictors: tuple[Any, ...] | None, state: DecodeState, sampling: Sampling
    ):
        """Take over from the prompts' own pass, which left `state`; `place` returned weights and predictors."""
        self._model, self._sampling = model, sampling
        self._weights, self._predictors, self._state = weights, predictors, state
        self._position = np.asarray(state.position).astype(np.int64)

    @property
    def finished(self) -> np.ndarray:
        """(B,) sequences that have ended."""
        return np.asarray(self._state.finished)

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended."""
        self._state = dataclasses.replace(self._state, finished=self._state.finished | jnp.asarray(rows))

    def advance(self, steps: int) -> tuple[np.ndarray, np.ndarray, None]:
        """As `DecodeLoop.advance`."""
        self._state, tokens, counts = decode_chunk(
            self._weights, self._predictors, self._state, self._sampling, jnp.int32(steps), model=self._model
        )
        tokens = np.asarray(tokens)[:, :steps]
        self._position = self._position + (tokens != PAD).sum(axis=1)
        return tokens, np.asarray(counts), None

    def check(self, ended: np.ndarray | bool = False) -> None:
        """As `DecodeLoop.check`; the message names the layer where that begins, if a cache shows it."""
        check_finite(self._state, self._position, ended)


def check_finite(state: DecodeState, position: np.ndarray, ended: np.ndarray | bool = False) -> None:
    """Raises: JsparseError: keys, values or logits of a sequence that has not `ended` (B,) were not finite at its
    position (B,); the message names the layer where that begins, if a cache shows it."""
    failed = ~np.asarray(state.finite) & ~np.asarray(ended)
    if not failed.any():
        return
    number = int(np.argmax(failed))
    damaged = [any(not jnp.isfinite(side[number]).all() for side in cache) for cache in state.caches]
    found = "the keys and values of all layers are finite, so this begins behind the last attention"
    if any(damaged):
        found = f"keys and values are not finite from layer {damaged.index(True)} on"
    dtype = state.caches[0][0].dtype
    advice = "check its weights" if dtype == jnp.float32 else "load the model with dtype='float32'"
    raise JsparseError(
        f"sequence {number}: keys, values or logits at position {position[number]} are not finite; {found} "
        f"(cache in {dtype}): {advice}"
    )


class Decoding:
    """A batch of prompts being decoded: prefilled when made, advanced by `advance`."""

    def __init__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        seed: int,
        executor: Executor,
        sparse: bool,
        pipeline: str = "sequential",
    ):
        """Prompts are lists of ids, none empty, each shorter than the context; see `jsparse.generate` for the rest."""
        config = params.config
        if reason := executor.refuses(config):
            raise JsparseError(f"executor {executor.name!r} cannot run this model: {reason}")
        self.model = Model(config, executor, config.ffn_spec(pipeline))
        self.sampling = sampling
        self._weights, predictors = executor.place(params.weights, params.predictors if sparse else None)
        longest = max(map(len, prompts))
        self._room = np.array([config.context_length - len(prompt) for prompt in prompts])
        self._produced, self._last = np.zeros(len(prompts), np.int64), np.zeros(len(prompts), np.int64)
        self._wanted = max_new_tokens
        self.remaining = min(max_new_tokens, int(self._room.max()))
        most = min(longest + max_new_tokens, config.context_length)
        slots = min(bucket(most), config.sliding_window or sys.maxsize)
        tokens = np.zeros((len(prompts), bucket(longest)), np.int32)
        for row, prompt in zip(tokens, prompts):
            row[: len(prompt)] = prompt
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        counts = np.zeros((config.num_layers, 2), np.int64)
        self.statistics = Statistics(self.model.spec, config.intermediate_size, sparse, counts)
        begun = time.perf_counter()
        state = self._prefill(tokens, jnp.asarray(lengths), keys, slots)
        check_finite(state, lengths - 1)
        self._first = np.asarray(state.token)
        choose = None if sampling.is_greedy else partial(_choose_jit, sampling=sampling)
        own = executor.loop(config, self.model.spec, self._weights, predictors, state, choose, CHUNK)
        self._loop = own or JittedLoop(self.model, self._weights, predictors, state, sampling)
        self.statistics.prefill_seconds = time.perf_counter() - begun

    def _prefill(self, tokens, lengths, keys, slots: int) -> DecodeState:
        """The state after the prompts, with caches of the embedding's dtype, or of float32 where that may not hold
        what is computed: float16 ends at 65,504, and the tokens to come may have larger keys than the prompts."""
        cache_dtype = jnp.dtype(getattr(self._weights.embed, "dtype", jnp.bfloat16))
        run = partial(prefill, self._weights, tokens, lengths, keys, self.sampling, model=self.model, slots=slots)
        state, largest = run(cache_dtype=cache_dtype.name)
        if not largest * _HEADROOM <= jnp.finfo(cache_dtype).max:
            state, _ = run(cache_dtype="float32")
        return state

    def check_finite(self, ended: np.ndarray) -> None:
        """As `DecodeLoop.check`."""
        self._loop.check(ended)

    @property
    def done(self) -> bool:
        return self.remaining <= 0 or bool(np.all(self._loop.finished))

    @property
    def cut(self) -> np.ndarray:
        """Sequences (B,) that the end of the context has ended before an end-of-text token or max_new_tokens did."""
        at_end = (self._produced == self._room) & (self._room < self._wanted)
        return at_end & ~np.isin(self._last, self.model.config.eos_token_ids)

    def first(self) -> np.ndarray:
        """The token chosen by the prefill, (B, 1)."""
        self.remaining -= 1
        return self._count(self._first[:, None])

    def _count(self, tokens: np.ndarray) -> np.ndarray:
        """Note how many tokens each sequence has, and its last."""
        some = (tokens != PAD).sum(axis=1)
        self._produced += some
        self._last = np.where(some > 0, tokens[np.arange(len(tokens)), np.maximum(some - 1, 0)], self._last)
        return tokens

    def advance(self, max_steps: int = CHUNK) -> np.ndarray:
        """Decode up to max_steps tokens per sequence, (B, steps), PAD where a sequence had ended."""
        steps = min(max_steps, self.remaining, CHUNK)
        begun = time.perf_counter()
        tokens, counts, fixed = self._loop.advance(steps)
        self.statistics.decode_seconds += time.perf_counter() - begun
        self.statistics.add(tokens, counts, fixed)
        self.remaining -= steps
        return self._count(tokens)

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended, whatever they would have said next."""
        self._loop.finish(rows)
