"""What the FFN of a ReGLU model computes, whichever executor computes it."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jsparse.model.config import FFNKind, ModelConfig
from jsparse.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class FFNSpec:
    """What every executor needs to know besides the arrays; static under jit.

    FFN(x) = down_t^T (phi(gate x) * psi(up x)). `reglu`: phi relu, psi identity; `drelu`: both relu; `fatrelu`: phi
    keeps a value when it is greater than `threshold`, psi identity; `swiglu`: phi silu, dense only.

    `sequential` computes the gate on the predicted neurons, and up and down on those whose gate survives; `parallel`
    computes gate and up on all predicted neurons at once, and down on the survivors.
    """

    kind: FFNKind = "reglu"
    threshold: float = 0.0
    pipeline: Literal["sequential", "parallel"] = "sequential"

    @classmethod
    def of(cls, config: ModelConfig, pipeline: Literal["sequential", "parallel"] = "sequential") -> "FFNSpec":
        return cls(config.ffn_kind, config.ffn_threshold, pipeline)

    def phi(self, gate: Float[Array, "..."]) -> Float[Array, "..."]:
        """The activation of the gate projection."""
        if self.kind == "swiglu":
            return jax.nn.silu(gate)
        return jnp.where(gate > self.threshold, gate, 0)

    def psi(self, up: Float[Array, "..."]) -> Float[Array, "..."]:
        """The activation of the up projection."""
        return jax.nn.relu(up) if self.kind == "drelu" else up
