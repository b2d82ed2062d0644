"""What an FFN computes, as data: every executor is told this, and none knows kinds by name."""

import dataclasses
from typing import Literal

Pipeline = Literal["sequential", "parallel"]


@dataclasses.dataclass(frozen=True)
class FFNSpec:
    """FFN(x) = down_t^T (phi(gate x) * psi(up x)); static under jit.

    Attributes:
      activation: phi. `relu` keeps a gate value that is greater than the neuron's threshold, `relu2` squares what relu
        keeps, `silu` is x sigmoid(x).
      up: psi, `linear` or `relu`; None where the FFN has no up matrix, and phi(gate x) stands alone.
      pipeline: `sequential` computes the gate on the predicted neurons, and up and down on those whose gate survives;
        `parallel` computes gate and up on all predicted neurons at once, and down on the survivors.
    """

    activation: Literal["relu", "relu2", "silu"]
    up: Literal["linear", "relu"] | None = "linear"
    pipeline: Pipeline = "sequential"

    @property
    def has_zeros(self) -> bool:
        """Whether neurons are exactly zero, so that they can be predicted and skipped."""
        return self.activation != "silu"

    @property
    def num_matrices(self) -> int:
        """Matrices of which a neuron is a row each."""
        return 2 if self.up is None else 3

    def rows(self, predicted: int, active: int) -> int:
        """Weight rows read for so many predicted neurons, of which so many are active."""
        if self.up is None:
            return predicted + active
        return predicted + 2 * active if self.pipeline == "sequential" else 2 * predicted + active


KINDS: dict[str, FFNSpec] = {
    "reglu": FFNSpec("relu"),
    "drelu": FFNSpec("relu", up="relu"),
    "fatrelu": FFNSpec("relu"),
    "relu2": FFNSpec("relu2", up=None),
    "swiglu": FFNSpec("silu"),
}
"""The FFNs that models have, by the names in their configurations. `fatrelu` alone has a threshold beside 0."""
SPARSE_KINDS = tuple(kind for kind, spec in KINDS.items() if spec.has_zeros)
HF_KINDS = tuple(kind for kind, spec in KINDS.items() if spec.up is not None)
"""The kinds that a Hugging Face checkpoint can be read as: no family without an up projection is read yet."""
