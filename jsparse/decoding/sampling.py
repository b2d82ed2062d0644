"""Choosing the next token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jsparse.errors import JsparseError
from jsparse.model.slots import SlotState
from jsparse.typing import Array, Float, Int

_SMALLEST = 1e-30
"""A lower temperature is greedy, and a smaller top_p is taken as this: float32 rounds what is far below to 0."""


class Sampling(NamedTuple):
    """How a sequence's tokens are chosen, as in `process_logits`; a temperature of 0 takes the most likely ones."""

    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def create(
        cls, vocab_size: int, *, temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0
    ) -> "Sampling":
        """Raises: JsparseError: a value is out of range; all are listed."""
        problems = []
        if not 0 <= temperature < float("inf"):
            problems.append(f"temperature is {temperature} and must be at least 0")
        if top_k is not None and top_k < 1:
            problems.append(f"top_k is {top_k} and must be at least 1, a whole number")
        if not 0 < top_p <= 1:
            problems.append(f"top_p is {top_p} and must be greater than 0 and at most 1")
        if problems:
            raise JsparseError("; ".join(problems))
        temperature = 0.0 if temperature < _SMALLEST else temperature
        return cls(temperature, min(top_k or vocab_size, vocab_size), max(top_p, _SMALLEST))


def choose(
    logits: Float[Array, "B T V"], position: Int[Array, "B T"], state: SlotState, draws: bool = True
) -> Int[Array, "B T"]:
    """The tokens at some positions: the most likely ones where the temperature is 0, else drawn.

    Without `draws` (static) no sequence has a temperature, and a program holds nothing of what draws need.

    A draw is the largest of `process_logits` plus Gumbel noise, which belongs to the sequence's key, the position and
    the token's id, and to nothing else: neighbours, chunks and steps that are taken again change no draw.
    """

    if draws:
        shape = logits.shape[-1:]
        of_position = jax.vmap(lambda key, at: jax.random.gumbel(jax.random.fold_in(key, at), shape), (None, 0))
        noise = jax.vmap(of_position)(state.key, position)
        is_drawn = (state.temperature > 0)[:, None, None]
        logits = jnp.where(is_drawn, process_logits(logits, state) + noise, logits)
    # The lowest id among equals; on a CPU XLA's argmax takes several times as long.
    return jax.lax.top_k(logits, 1)[1][..., 0]


def process_logits(logits: Float[Array, "B T V"], state: SlotState) -> Float[Array, "B T V"]:
    """Unnormalised log-probabilities of what each sequence draws from.

    That is softmax(logits / temperature), kept to the top_k most likely tokens (V keeps all) and then to the smallest
    set of those whose probability reaches top_p; the others are -inf. Rows of temperature 0 are left as they are.
    """
    temperature = jnp.where(state.temperature > 0, state.temperature, 1)[:, None, None]
    # The largest becomes 0 first, or a low temperature makes infinities of large logits.
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    size = logits.shape[-1]

    def restrict(scaled):
        ordered, ids = jax.lax.top_k(scaled, size)
        ordered = jnp.where(jnp.arange(size) < state.top_k[:, None, None], ordered, -jnp.inf)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ordered = jnp.where(before < state.top_p[:, None, None], ordered, -jnp.inf)
        return jnp.put_along_axis(scaled, ids, ordered, axis=-1, inplace=False)

    restricts = (state.temperature > 0) & ((state.top_k < size) | (state.top_p < 1))
    scaled = jax.lax.cond(jnp.any(restricts), restrict, lambda scaled: scaled, scaled)
    return jnp.where((state.temperature > 0)[:, None, None], scaled, logits)
