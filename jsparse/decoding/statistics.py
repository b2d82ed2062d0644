"""What a generation did and cost."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jsparse.model.ffn import FFNSpec


@dataclasses.dataclass
class Statistics:
    """What a generation did and cost.

    Attributes:
      prefill_seconds, decode_seconds: wall time, compilation included.
      decoded_tokens: tokens after the first of each sequence, over all sequences.
      counts: (L, 2) neurons predicted active and truly active, summed over those tokens.
      rows: FFN weight rows read for those tokens in sparse decoding.
      spec: of the FFN, and with it which rows a predicted neuron costs.
      num_neurons: F, of one layer.
      sparse: whether decoding was sparse.
    """

    spec: FFNSpec
    num_neurons: int
    sparse: bool
    counts: np.ndarray
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    rows: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else float("nan")

    @property
    def rows_read(self) -> float:
        """Share of the FFN's weight rows that sparse decoding read; 1 for a dense generation."""
        if not self.sparse or not self.decoded_tokens:
            return 1.0
        dense = self.spec.num_matrices * self.num_neurons * len(self.counts)
        return self.rows / (self.decoded_tokens * dense)

    def add(self, decoded: int, counts: np.ndarray, fixed: Sequence[int] | None = None) -> None:
        """Count some decoded tokens: neuron counts (L, 2), or neurons of each layer all of whose rows each read."""
        predicted, active = counts.sum(axis=0).tolist()
        all_of_fixed = None if fixed is None else self.spec.num_matrices * sum(fixed) * decoded
        self.rows += self.spec.rows(predicted, active) if all_of_fixed is None else all_of_fixed
        self.counts += counts
        self.decoded_tokens += decoded
