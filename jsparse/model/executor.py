"""What the decoder asks of the device that computes it: the Protocol that every executor follows."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jsparse.arrays import Matrix
from jsparse.model.cache import LayerCache
from jsparse.model.config import ModelConfig
from jsparse.model.ffn import FFNSpec
from jsparse.model.norm import rms_norm
from jsparse.model.slots import SlotState
from jsparse.model.weights import FFNWeights, Linear, Predictor, Weights
from jsparse.typing import Array, Float, Int

Split = Literal["out", "in", "vocab"]
"""How a mesh divides a product: by its outputs, by what is summed, or by the vocabulary. One device divides nothing."""


class DecodeLoop(Protocol):
    """A batch of sequences that is decoded some steps at a time."""

    @property
    def active(self) -> np.ndarray:
        """(B,) sequences that have not ended."""

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended."""

    def advance(self, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int] | None]:
        """Decode up to `steps` tokens of every sequence.

        Returns:
          tokens (B, n) and how many of them each sequence has (B,): the first ones;
          counts (L, 2) of neurons predicted and active, summed over these tokens;
          the neurons of each layer whose rows were read for every token, or None where only rows that the counts
          account for were.
        """

    def check(self, ended: np.ndarray | bool = False) -> None:
        """Raises: JsparseError: keys, values or logits of a sequence that has not `ended` (B,) were not finite."""


@runtime_checkable
class Executor(Protocol):
    """A device and how it computes. Frozen, hashable and without arrays: a static argument of `jax.jit`.

    `refuses`, `place`, `norm` and `loop` have bodies, which are right for executors that compute where JAX does.
    """

    name: str

    def refuses(self, config: ModelConfig, kv_dtype: str | None = None) -> str | None:
        """Why it cannot compute such a model with keys and values stored so, or None."""
        return config.unimplemented()

    def place(self, weights: Weights, predictors: tuple[Predictor, ...] | None) -> tuple[Weights, Any]:
        """Weights and predictors where a step of this executor takes them."""
        return weights, predictors

    def rows(self, matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
        """Rows of the matrix in float32; only those are read, and an index past the end gives zeros."""

    def norm(self, x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
        """As `rms_norm`."""
        return rms_norm(x, scale, eps)

    def project(
        self, x: Float[Array, "... D"], linears: Sequence[Linear], split: Split = "out"
    ) -> tuple[Float[Array, "... out"], ...]:
        """rows x + bias for every linear map, in float32."""

    def dense_ffn(self, x: Float[Array, "... D"], ffn: FFNWeights, spec: FFNSpec) -> Float[Array, "... D"]:
        """The FFN over all neurons (the formula is at `FFNSpec`)."""

    def sparse_ffn(
        self,
        x: Float[Array, "B D"],
        ffn: FFNWeights,
        predictor: Predictor,
        spec: FFNSpec,
        route: Float[Array, "B E"] | None = None,
    ) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
        """The FFN restricted to the predicted neurons, reading the rows of no others.

        Args:
          x: FFN inputs, one token per row; every token has its own active set.
          ffn, predictor: of the layer.
          spec: an FFN that has zeros, and its pipeline.
          route: what scales the hidden values of each token's neurons, which are E groups of F / E; where it is zero
            a group is neither scored nor read. None for ones.

        Returns:
          y, and counts: neurons predicted active, and those of them whose hidden value is not zero.
        """

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        count: Int[Array, "B"],
        cache: LayerCache,
        window: int | None,
    ) -> tuple[Float[Array, "B T N H"], LayerCache]:
        """New tokens of each sequence over its cache, which takes their keys and values; as `attention.attend`."""

    def loop(
        self,
        config: ModelConfig,
        spec: FFNSpec,
        weights: Weights,
        predictors: Any,
        caches: tuple[LayerCache, ...],
        state: SlotState,
        choose: Callable | None,
        chunk: int,
    ) -> DecodeLoop | None:
        """A decode loop of the device's own, or None for the jitted one.

        Args:
          weights, predictors: as `place` returned them.
          caches, state: after the prompts.
          choose: from logits (B, V) and the positions (B,) of the tokens to choose to these; None takes the most
            likely ones.
          chunk: most steps of one `advance`.
        """
        return None
