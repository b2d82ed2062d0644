"""What a generation did and cost."""

import dataclasses
from collections.abc import Sequence

import numpy as np

PAD = -1
"""Stands in a chunk of tokens where a sequence had already ended."""


@dataclasses.dataclass
class Statistics:
    """What a generation did and cost.

    Attributes:
      prefill_seconds, decode_seconds: wall time, compilation included.
      decoded_tokens: tokens after the first of each sequence, over all sequences.
      counts: (L, 2) neurons predicted active and truly active, summed over those tokens.
      rows: FFN weight rows read for those tokens in sparse decoding.
      rows_per_token: FFN weight rows of one layer a dense step reads: 3 F.
      pipeline: which rows a predicted neuron costs.
      sparse: whether decoding was.
    """

    rows_per_token: int
    pipeline: str
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
        return self.rows / (self.decoded_tokens * self.rows_per_token * len(self.counts))

    def add(self, tokens: np.ndarray, counts: np.ndarray, fixed: Sequence[int] | None = None) -> None:
        """Count the tokens of a chunk: neuron counts (L, 2), or neurons of each layer all of whose rows each read."""
        decoded = int((tokens != PAD).sum())
        predicted, active = counts.sum(axis=0).tolist()
        rows = predicted + 2 * active if self.pipeline == "sequential" else 2 * predicted + active
        self.rows += rows if fixed is None else 3 * sum(fixed) * decoded
        self.counts += counts
        self.decoded_tokens += decoded
