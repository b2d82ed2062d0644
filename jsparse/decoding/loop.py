"""Decoding: prompts in chunks, then the jitted loop that runs many steps."""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.decoding.forward import Model, forward
from jsparse.decoding.sampling import Sampling, choose
from jsparse.decoding.statistics import Statistics
from jsparse.errors import JsparseError
from jsparse.model.cache import LayerCache, cache_dtype, make_caches
from jsparse.model.executor import Executor
from jsparse.model.slots import SlotState
from jsparse.model.weights import Params, Weights
from jsparse.typing import Array, Bool, Float, Int, Shaped

STEPS = 32
"""Most decode steps per call of the jitted loop."""
PREFILL = 512
"""Most tokens of a prompt per pass."""
_HEADROOM = 4
"""Times the largest key or value of the prompts that a cache must hold."""

Caches = tuple[LayerCache, ...]


@partial(jax.jit, static_argnames="model", donate_argnames=("caches", "logits"))
def prefill_chunk(
    weights: Weights,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    count: Int[Array, "B"],
    caches: Caches,
    logits: Float[Array, "B V"],
    *,
    model: Model,
) -> tuple[Caches, Float[Array, "B V"]]:
    """Feed the next tokens of each prompt densely; `logits` become those of the prompts that have some."""
    found, caches, _ = forward(weights, None, tokens, start, count, caches, model=model)
    return caches, jnp.where(count[:, None] > 0, found, logits)


@partial(jax.jit, static_argnames=("eos_ids", "draws"))
def first_token(
    logits: Float[Array, "B V"], state: SlotState, eos_ids: tuple[int, ...], draws: bool
) -> tuple[SlotState, Int[Array, "B"]]:
    """The state once each sequence has the token behind its prompt."""
    token = choose(logits[:, None], state.position[:, None] + 1, state, draws)[:, 0]
    return state.take(token, jnp.all(jnp.isfinite(logits), axis=-1), eos_ids), token


@partial(jax.jit, static_argnames=("model", "draws"), donate_argnames=("caches", "state"))
def step_chunk(
    weights: Weights,
    predictors: tuple[Any, ...] | None,
    caches: Caches,
    state: SlotState,
    num_steps: Int[Array, ""],
    *,
    model: Model,
    draws: bool,
) -> tuple[Caches, SlotState, Int[Array, "B steps"], Int[Array, "B"], Int[Array, "L 2"]]:
    """Up to num_steps (at most STEPS) decode steps in one device program; it ends when every sequence has.

    Draws says whether a sequence may have a temperature (see `choose`).

    Returns:
      caches and state, the tokens chosen and how many of them each sequence has (its first ones), and the neuron counts
      summed over these tokens.
    """

    def step(carry):
        i, caches, state, tokens, produced, counts = carry
        count = state.active.astype(jnp.int32)
        logits, caches, step_counts = forward(
            weights, predictors, state.token[:, None], state.position, count, caches, model=model
        )
        is_finite = jnp.all(jnp.isfinite(logits), axis=-1) & _hold(caches, state.position)
        chosen = choose(logits[:, None], state.position[:, None] + 1, state, draws)[:, 0]
        takes = state.active & is_finite
        tokens = tokens.at[:, i].set(chosen)
        counts = counts + jnp.sum(jnp.where(takes[:, None], step_counts, 0), axis=1)
        state = state.take(chosen, is_finite, model.config.eos_token_ids)
        return i + 1, caches, state, tokens, produced + takes, counts

    def unfinished(carry):
        return (carry[0] < num_steps) & jnp.any(carry[2].active)

    batch = state.token.size
    tokens, produced = jnp.zeros((batch, STEPS), jnp.int32), jnp.zeros(batch, jnp.int32)
    counts = jnp.zeros((model.config.num_layers, 2), jnp.int32)
    carry = jnp.int32(0), caches, state, tokens, produced, counts
    return jax.lax.while_loop(unfinished, step, carry)[1:]


def _hold(caches: Caches, position: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether the caches hold what was written at the position: float16 makes infinity of what is beyond it, and
    attention then passes over a key without a trace in the logits."""
    held = jnp.ones(position.shape, bool)
    for side in (side for cache in caches for side in (cache.keys, cache.values) if side.dtype == jnp.float16):
        newest = side[jnp.arange(position.size), position % side.shape[1]]
        held &= jnp.all(jnp.isfinite(newest), axis=(1, 2))
    return held


@jax.jit
def _largest(caches: Caches) -> Float[Array, ""]:
    """The largest magnitude of what is stored."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(side)) for side in jax.tree.leaves(caches)]))


def bucket(length: int) -> int:
    """The padded length: the next power of two from 32 to 512, then the next multiple of 512."""
    if length > 512:
        return -(-length // 512) * 512
    return max(32, 1 << (length - 1).bit_length())


class JittedLoop:
    """The decode loop in JAX: chunks of `step_chunk` over caches and state."""

    def __init__(
        self, model: Model, weights: Weights, predictors: tuple[Any, ...] | None, caches: Caches, state: SlotState
    ):
        """Take over from the prompts, which left caches and state; `place` returned weights and predictors."""
        self._model, self._weights, self._predictors = model, weights, predictors
        self._caches, self._state = caches, state
        self._draws = bool(np.any(np.asarray(state.temperature) > 0))

    @property
    def active(self) -> np.ndarray:
        """(B,) sequences that have not ended."""
        return np.asarray(self._state.active)

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended."""
        self._state = dataclasses.replace(self._state, active=self._state.active & ~jnp.asarray(rows))

    def advance(self, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, None]:
        """As `DecodeLoop.advance`."""
        operands = self._weights, self._predictors, self._caches, self._state, np.int32(steps)
        self._caches, self._state, *found = step_chunk(*operands, model=self._model, draws=self._draws)
        return *map(np.asarray, found), None

    def check(self, ended: np.ndarray | bool = False) -> None:
        """As `DecodeLoop.check`; the message names the layer where that begins, if a cache shows it."""
        check_finite(self._caches, self._state, ended)


def check_finite(caches: Caches, state: SlotState, ended: np.ndarray | bool = False) -> None:
    """Raises: JsparseError: keys, values or logits of a sequence that has not `ended` (B,) were not finite; the message
    names the layer where that begins, if a cache shows it."""
    failed = ~np.asarray(state.finite) & ~np.asarray(ended)
    if not failed.any():
        return
    number = int(np.argmax(failed))
    damaged = [any(not jnp.isfinite(side[number]).all() for side in jax.tree.leaves(cache)) for cache in caches]
    found = "the keys and values of all layers are finite, so this begins behind the last attention"
    if any(damaged):
        found = f"keys and values are not finite from layer {damaged.index(True)} on"
    dtype = caches[0].keys.dtype
    advice = "check its weights" if dtype == jnp.float32 else "load the model with dtype='float32'"
    raise JsparseError(
        f"sequence {number}: keys, values or logits at position {int(state.position[number])} are not finite; {found} "
        f"(cache in {dtype}): {advice}"
    )


class Decoding:
    """A batch of prompts being decoded: prefilled when made, advanced by `advance`."""

    def __init__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        executor: Executor,
        sparse: bool,
        pipeline: str = "sequential",
        kv_dtype: str | None = None,
    ):
        """Prompts are lists of ids, none empty, each shorter than the context; see `jsparse.generate` for the rest."""
        config = params.config
        if reason := executor.refuses(config, kv_dtype):
            raise JsparseError(f"executor {executor.name!r} cannot run this model: {reason}")
        self.model = Model(config, executor, config.ffn_spec(pipeline))
        self._weights, predictors = executor.place(params.weights, params.predictors if sparse else None)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        self._wanted = max_new_tokens
        self._kv_dtype = kv_dtype or cache_dtype(params.weights.embed)
        self._limit = np.minimum(min(max_new_tokens, config.context_length), config.context_length - lengths)
        counts = np.zeros((config.num_layers, 2), np.int64)
        self.statistics = Statistics(self.model.spec, config.intermediate_size, sparse, counts)
        begun = time.perf_counter()
        caches, logits = self._prefill(prompts, lengths)
        state = initial_state(lengths, self._limit, seed, sampling)
        draws = sampling.temperature > 0
        state, token = first_token(logits, state, config.eos_token_ids, draws)
        check_finite(caches, state)
        self._last = np.asarray(token)
        self._produced = np.ones_like(self._limit)
        chooser = partial(_choose_one, state=state) if draws else None
        own = executor.loop(config, self.model.spec, self._weights, predictors, caches, state, chooser, STEPS)
        self._loop = own or JittedLoop(self.model, self._weights, predictors, caches, state)
        self.statistics.prefill_seconds = time.perf_counter() - begun

    def _prefill(self, prompts, lengths: np.ndarray) -> tuple[Caches, Float[Array, "B V"]]:
        """Caches after the prompts, and the logits of their last tokens.

        Float16 ends at 65,504, and tokens to come may have larger keys than the prompts: where it may not hold what is
        computed, caches are of float32.
        """
        caches, logits = self._prefill_in(prompts, lengths, self._kv_dtype)
        return (caches, logits) if caches is not None else self._prefill_in(prompts, lengths, "float32")

    def _prefill_in(self, prompts, lengths, dtype: str) -> tuple[Caches | None, Float[Array, "B V"]]:
        """With None for caches of that dtype which may not hold what is computed."""
        config, longest = self.model.config, int(lengths.max())
        most = min(bucket(int((lengths + self._limit).max())), config.context_length)
        caches = make_caches(config, len(prompts), most, dtype)
        # No more at once than the smallest ring holds, so that all of it can be looked at.
        smallest = min(cache.num_slots for cache in caches)
        size = min(PREFILL, 1 << (smallest.bit_length() - 1))
        padded = np.zeros((len(prompts), longest + size), np.int32)
        for row, prompt in zip(padded, prompts):
            row[: len(prompt)] = prompt
        logits = jax.device_put(np.zeros((len(prompts), config.vocab_size), np.float32))
        for first in range(0, longest, size):
            tokens = padded[:, first : first + min(size, bucket(longest - first))]
            start = np.full_like(lengths, first)
            count = np.clip(lengths - first, 0, tokens.shape[1])
            caches, logits = prefill_chunk(self._weights, tokens, start, count, caches, logits, model=self.model)
            if dtype == "float16" and not _largest(caches) * _HEADROOM <= jnp.finfo(dtype).max:
                return None, logits
        return caches, logits

    def check_finite(self, ended: np.ndarray) -> None:
        """As `DecodeLoop.check`."""
        self._loop.check(ended)

    @property
    def done(self) -> bool:
        return not self._loop.active.any()

    @property
    def cut(self) -> np.ndarray:
        """Sequences (B,) that the end of the context has ended before an end-of-text token or max_new_tokens did."""
        at_end = (self._produced == self._limit) & (self._limit < self._wanted)
        return at_end & ~np.isin(self._last, self.model.config.eos_token_ids)

    def first(self) -> list[np.ndarray]:
        """The token chosen behind each prompt."""
        return list(self._last[:, None])

    def advance(self, max_steps: int = STEPS) -> list[np.ndarray]:
        """Decode up to max_steps tokens per sequence: those that each has got, none where it had ended."""
        left = (self._limit - self._produced)[self._loop.active]
        begun = time.perf_counter()
        tokens, produced, counts, fixed = self._loop.advance(min(max_steps, STEPS, int(left.max(initial=1))))
        self.statistics.decode_seconds += time.perf_counter() - begun
        self.statistics.add(int(produced.sum()), counts, fixed)
        self._produced = self._produced + produced
        self._last = np.where(produced > 0, tokens[np.arange(len(tokens)), np.maximum(produced, 1) - 1], self._last)
        return [row[:count] for row, count in zip(tokens, produced)]

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended, whatever they would have said next."""
        self._loop.finish(rows)


def initial_state(lengths: np.ndarray, limit: np.ndarray, seed: int, sampling: Sampling) -> SlotState:
    """The state before the first new token of sequences of these lengths, each to get as many tokens as its limit."""
    batch = len(lengths)
    return SlotState(
        token=np.zeros(batch, np.int32),
        position=lengths - 1,
        produced=np.zeros(batch, np.int32),
        limit=limit,
        active=np.ones(batch, bool),
        finite=np.ones(batch, bool),
        key=_keys(np.int32(seed), batch),
        temperature=np.full(batch, sampling.temperature, np.float32),
        top_k=np.full(batch, sampling.top_k, np.int32),
        top_p=np.full(batch, sampling.top_p, np.float32),
    )


@partial(jax.jit, static_argnames="batch")
def _keys(seed: Int[Array, ""], batch: int) -> Shaped[Array, "B"]:
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(batch))


@jax.jit
def _choose_one(logits: Float[Array, "B V"], position: Int[Array, "B"], state: SlotState) -> Int[Array, "B"]:
    return choose(logits[:, None], position[:, None], state)[:, 0]
