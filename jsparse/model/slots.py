"""The state of every sequence of a batch, one slot each."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jsparse.typing import Array, Bool, Float, Int, Shaped

_FIELDS = (
    "token",
    "position",
    "produced",
    "limit",
    "active",
    "finite",
    "key",
    "temperature",
    "top_k",
    "top_p",
)


@partial(jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=())
@dataclasses.dataclass(frozen=True)
class SlotState:
    """Everything but the caches that changes from step to step, and how each sequence is sampled.

    Attributes:
      token: (B,) the newest token, not yet fed to the model.
      position: (B,) that token's position.
      produced: (B,) tokens chosen so far.
      limit: (B,) tokens at which a sequence ends.
      active: (B,) sequences that have not ended.
      finite: (B,) sequences whose logits, keys and values have been finite so far.
      key: (B,) random keys, one per sequence; that of a position is `fold_in(key, position)`.
      temperature, top_k, top_p: (B,) as in `jsparse.decoding.sampling.process_logits`.
    """

    token: Int[Array, "B"]
    position: Int[Array, "B"]
    produced: Int[Array, "B"]
    limit: Int[Array, "B"]
    active: Bool[Array, "B"]
    finite: Bool[Array, "B"]
    key: Shaped[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]

    def take(self, token: Int[Array, "B"], is_finite: Bool[Array, "B"], eos_ids: tuple[int, ...]) -> "SlotState":
        """The state after each active sequence has taken its next token, or ended because that was not finite."""
        takes = self.active & is_finite
        produced = self.produced + takes
        ends = jnp.isin(token, jnp.asarray(eos_ids, token.dtype)) | (produced >= self.limit)
        return dataclasses.replace(
            self,
            token=jnp.where(takes, token, self.token),
            position=self.position + takes,
            produced=produced,
            active=takes & ~ends,
            finite=self.finite & (is_finite | ~self.active),
        )
