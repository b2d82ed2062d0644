"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp

from jsparse.typing import Array, Float, Int, Shaped


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
