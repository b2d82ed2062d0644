"""The pytrees of a model: weights, predictors, and `Params` that holds both."""

import dataclasses
from functools import partial
from typing import Any

import jax

from jsparse.arrays import Matrix
from jsparse.model.config import ModelConfig
from jsparse.typing import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=("gate", "up", "down_t", "threshold"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class FFNWeights:
    """The FFN of one layer. Neuron j is row j of every matrix: one contiguous read each.

    Attributes:
      gate: (F, D), under the activation.
      up: (F, D), or None where the FFN has none.
      down_t: (F, D), the transpose of the checkpoint's down_proj.
      threshold: (F,) float32, which a neuron's gate must exceed; made from the configuration and not saved.
    """

    gate: Matrix
    up: Matrix | None
    down_t: Matrix
    threshold: Float[Array, "F"]


@partial(jax.tree_util.register_dataclass, data_fields=("rows", "bias"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear map x -> rows x + bias.

    Attributes:
      rows: (out, in).
      bias: (out,) float32, or None.
    """

    rows: Matrix
    bias: Float[Array, "out"] | None = None


@partial(jax.tree_util.register_dataclass, data_fields=("q", "k", "v", "o"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class AttentionWeights:
    """The projections of one layer's attention.

    Attributes:
      q: from D to N heads of dimension H, one after another.
      k, v: from D to K heads of dimension H.
      o: from the N heads back to D.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("input_norm", "attention", "post_attention_norm", "ffn"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: attention and FFN, each behind a norm whose scale (D,) stands here."""

    input_norm: Float[Array, "D"]
    attention: AttentionWeights
    post_attention_norm: Float[Array, "D"]
    ffn: FFNWeights


@partial(jax.tree_util.register_dataclass, data_fields=("embed", "layers", "norm", "head"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Weights:
    """All weights of a model; `jsparse.model.parameters` has the table of them.

    Attributes:
      embed: (V, D).
      layers: one `Layer` each, never stacked.
      norm: (D,), the scale of the norm before the head.
      head: (V, D), or None where it is the embedding.
    """

    embed: Matrix
    layers: tuple[Layer, ...]
    norm: Float[Array, "D"]
    head: Matrix | None = None

    def replace_layer(self, index: int, **changes: Any) -> "Weights":
        """The same weights but for some fields of one layer."""
        layers = list(self.layers)
        layers[index] = dataclasses.replace(layers[index], **changes)
        return dataclasses.replace(self, layers=tuple(layers))


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b", "bias", "rate"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Predictor:
    """The low-rank predictor of one layer: neuron j is predicted active iff (b a x + bias)_j > 0.

    Attributes:
      a: (R, D).
      b: (F, R).
      bias: (F,) float32; +inf for a neuron that is always predicted, -inf for one that never is.
      rate: (F,) float32, share of the calibration tokens on which each neuron was active; None where nobody counted.
    """

    a: Matrix
    b: Matrix
    bias: Float[Array, "F"]
    rate: Float[Array, "F"] | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@partial(jax.tree_util.register_dataclass, data_fields=("weights", "predictors"), meta_fields=("config", "tokenizer"))
@dataclasses.dataclass(frozen=True)
class Params:
    """A model ready to generate.

    Attributes:
      config: the architecture (static).
      weights: matrices, norms and biases.
      predictors: one `Predictor` per layer, or None for a model that only decodes densely.
      tokenizer: a `jsparse.text.tokenizer.Tokenizer`, or None for a model used on token ids alone (static).
    """

    config: ModelConfig
    weights: Weights
    predictors: tuple[Predictor, ...] | None = None
    tokenizer: Any = None
