"""What a family of checkpoints is, and what several of them share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from convert.fields import Fields
from jsparse.model.config import ModelConfig

NAMES = {
    "embed": "model.embed_tokens.weight",
    "input_norm": "input_layernorm.weight",
    "attention/q/rows": "self_attn.q_proj.weight",
    "attention/q/bias": "self_attn.q_proj.bias",
    "attention/k/rows": "self_attn.k_proj.weight",
    "attention/k/bias": "self_attn.k_proj.bias",
    "attention/v/rows": "self_attn.v_proj.weight",
    "attention/v/bias": "self_attn.v_proj.bias",
    "attention/o/rows": "self_attn.o_proj.weight",
    "attention/o/bias": "self_attn.o_proj.bias",
    "post_attention_norm": "post_attention_layernorm.weight",
    "ffn/gate": "mlp.gate_proj.weight",
    "ffn/up": "mlp.up_proj.weight",
    "ffn/down_t": "mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Llama's name of every parameter by its path, within a layer for those that each layer has."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """One family of Hugging Face checkpoints.

    Attributes:
      model_type: as config.json has it.
      architecture: the class of transformers, or of the code that comes with the checkpoints.
      defaults: what that class takes for an absent key of config.json.
      read: from config.json and the fields of `ModelConfig` known so far to those that this family alone decides.
      write: from a model's configuration to the keys of config.json that this family alone has.
      ffn_kind: the kind of its FFN, where config.json does not say it; None where its activation does.
      names: Hugging Face's name of every parameter, as `NAMES`.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields, dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    ffn_kind: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: NAMES)


def refuse_attention_bias(fields: Fields) -> None:
    """Note a problem where config.json asks for biases, for families whose classes have no such key."""
    if fields.flag("attention_bias"):
        fields.problems.append("attention_bias is set, which this family does not have")


def layer_windows(
    fields: Fields, model_type: str, window: int | None, layers: int, first: int = 0
) -> dict[str, int | tuple[bool, ...] | None]:
    """The window, and which layers have it: those of `layer_types`, or without these those from `first` on."""
    if window is not None and window < 1:
        fields.problems.append(f"sliding_window is {window} and must be at least 1 or null")
        return {}
    types = fields.raw.get("layer_types")
    if types is None and (window is None or first >= layers):
        return {}
    if types is None and layers > _MOST_LAYERS:
        fields.problems.append(f"num_hidden_layers is {layers}, and the window of each would have to be listed")
        return {}
    if types is None:
        slides = tuple(layer >= first for layer in range(layers))
    elif isinstance(types, list) and len(types) == layers and {*map(str, types)} <= _TYPES.keys():
        slides = tuple(_TYPES[str(kind)] for kind in types)
    else:
        fields.problems.append(f"layer_types is {types!r}, not sliding_attention or full_attention for each layer")
        return {}
    if types is not None and any(slides) and window is None:
        fields.problems.append(f"layer_types asks for a sliding window, which {model_type} has none of here")
    return {"sliding_window": window, "slides": slides} if window is not None and any(slides) else {}


_MOST_LAYERS = 10_000
_TYPES = {"sliding_attention": True, "full_attention": False}
