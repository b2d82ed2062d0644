"""How predictors are fitted, and what is reported of each layer."""

import dataclasses
import operator
from typing import Literal

import numpy as np

from jsparse.errors import JsparseError
from jsparse.model.config import ModelConfig
from jsparse.model.ffn import SPARSE_KINDS
from jsparse.options import check_flag, is_number, is_whole
from jsparse.predictors.svd import BITS, check_rank
from jsparse.predictors.thresholds import BiasMode, SilencedRule


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """How predictors are fitted. The defaults are this project's recipe; `paper()` gives SVDP's.

    Attributes:
      rank: one number, or one per layer; None is a quarter of the hidden size.
      bits: 16, 8 or 4 per element of a and b.
      sparsity: share of each layer's measured activation sparsity that is skipped; the first two layers use 0.1 less.
      tokens: calibration tokens to use of the text.
      seed: chooses which, where the text has more, and their order.
      whiten, center: False switches the data's metric, or its mean, off (ablations).
      refit: False keeps the SVD's second factor; else it is fitted to the clipped gate (see `fit_low_bit`).
      bias: threshold per neuron, one per layer, or none (ablations).
      importance: what skipping a neuron costs: the squared gate activation, hidden activation, or output norm.
      silenced: what happens when 1% of the neurons are off on all tokens (see `thresholds.raise_levels`).
    """

    rank: int | np.integer | tuple[int, ...] | None = None
    bits: int = 4
    sparsity: float = 0.95
    tokens: int = 20_000
    seed: int = 0
    whiten: bool = True
    center: bool = True
    refit: bool = True
    bias: BiasMode = "neuron"
    importance: Literal["gate", "hidden", "output"] = "output"
    silenced: SilencedRule = "spare"

    @classmethod
    def paper(cls, rank: int, sparsity: float) -> "CalibrationOptions":
        """The published recipe: 16 bits, no centring, no refit, and an early stop where many neurons are rare."""
        return cls(rank=rank, bits=16, sparsity=sparsity, center=False, refit=False, silenced="stop")

    def ranks(self, config: ModelConfig) -> tuple[int, ...]:
        """The rank of every layer."""
        rank = max(1, config.hidden_size // 4) if self.rank is None else self.rank
        return (
            (operator.index(rank),) * config.num_layers
            if np.ndim(rank) == 0
            else tuple(operator.index(r) for r in rank)
        )

    def check(self, config: ModelConfig) -> None:
        """Raises: JsparseError: an option is out of range for the model."""
        if not config.is_sparse:
            raise JsparseError(
                f"a {config.ffn_kind} FFN has no zero neurons to predict; calibration needs a model with one of "
                f"{', '.join(SPARSE_KINDS)}"
            )
        try:
            ranks = self.ranks(config)
        except TypeError:
            raise JsparseError(f"rank is {self.rank}; it must be a whole number, or one per layer") from None
        if isinstance(self.rank, bool):
            raise JsparseError(f"rank is {self.rank}; it must be a whole number, or one per layer")
        if len(ranks) != config.num_layers:
            raise JsparseError(f"rank has {len(ranks)} values; the model has {config.num_layers} layers")
        for rank in ranks:
            check_rank(rank, config.hidden_size)
        for name in ("whiten", "center", "refit"):
            check_flag(name, getattr(self, name))
        if not is_whole(self.bits) or self.bits not in BITS:
            raise JsparseError(f"bits is {self.bits!r}; a predictor has 16, 8 or 4")
        if not (is_number(self.sparsity) and 0 <= self.sparsity <= 1):
            raise JsparseError(f"sparsity is {self.sparsity!r}; it must be between 0 and 1")
        if not is_whole(self.seed) or self.seed < 0:
            raise JsparseError(f"seed is {self.seed!r}; it must be a whole number of at least 0")
        if not is_whole(self.tokens) or self.tokens < 1:
            raise JsparseError(f"tokens is {self.tokens!r}; it must be a whole number of at least 1")
        if self.bias not in ("neuron", "layer", "none"):
            raise JsparseError(f"bias is {self.bias!r}; it must be neuron, layer or none")
        if self.importance not in ("gate", "hidden", "output"):
            raise JsparseError(f"importance is {self.importance!r}; it must be gate, hidden or output")
        if self.silenced not in ("spare", "stop"):
            raise JsparseError(f"silenced is {self.silenced!r}; it must be spare or stop")


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What calibration found of a layer, measured on the second half of the tokens.

    Attributes:
      layer, rank: of the predictor.
      sparsity: share of (token, neuron) pairs that are zero.
      skipped: share of pairs that the predictor skips.
      recall: share of the non-zero pairs that the predictor keeps.
      stopped_early: the target was not reached: raising thresholds further would silence too many neurons.
    """

    layer: int
    rank: int
    sparsity: float
    skipped: float
    recall: float
    stopped_early: bool
