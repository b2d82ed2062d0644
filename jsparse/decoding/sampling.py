"""Choosing the next token from logits."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jsparse.errors import JsparseError
from jsparse.model.config import ModelConfig
from jsparse.typing import Array, Float, Int, Shaped

_COLDEST = 1e-30
"""Temperatures below are greedy: float32 has no room for the quotient."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_k", "top_p", "eos_ids"),
    meta_fields=("is_greedy",),
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; only `is_greedy` is static, so other values compile nothing.

    Attributes:
      temperature, top_k, top_p: as in `jsparse.decoding.sampling.sample`.
      eos_ids: (n,) int32, tokens that end a sequence.
      is_greedy: take the most likely token.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    eos_ids: Int[Array, "n"]
    is_greedy: bool

    @classmethod
    def create(
        cls, config: ModelConfig, *, temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0
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
        return cls(
            jnp.float32(temperature),
            jnp.int32(min(top_k or config.vocab_size, config.vocab_size)),
            jnp.float32(top_p),
            jnp.asarray(config.eos_token_ids, jnp.int32),
            temperature < _COLDEST,
        )


def greedy(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The most likely token, the lowest id among equals."""
    # On a CPU XLA's argmax takes several times as long.
    return jax.lax.top_k(logits, 1)[1][:, 0]


def sample(
    logits: Float[Array, "B V"],
    keys: Shaped[Array, "B"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, "B"]:
    """Draw from softmax(logits / temperature), kept to the top_k most likely tokens and then to the smallest set of
    those whose probability reaches top_p.

    Args:
      logits: unnormalised.
      keys: one random key per sequence, so that a sequence's draws do not depend on its neighbours.
      temperature: greater than 0.
      top_k: 1 or more; the vocabulary's size keeps all.
      top_p: in (0, 1]; 1 keeps all.
    """
    scaled, ids = jax.lax.top_k(logits - jnp.max(logits, axis=-1, keepdims=True), logits.shape[-1])
    scaled = scaled / temperature
    scaled = jnp.where(jnp.arange(logits.shape[-1]) < top_k, scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    scaled = jnp.where(before < top_p, scaled, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0].astype(jnp.int32)
