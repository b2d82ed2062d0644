"""Mistral."""

from typing import Any

from convert.families import llama
from convert.families.family import Family, layer_windows, refuse_attention_bias
from convert.fields import Fields
from jsparse.model.config import ModelConfig

DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def read(fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
    refuse_attention_bias(fields)
    window = fields.number("sliding_window", int, optional=True)
    return layer_windows(fields, "mistral", window, known["num_layers"])


def write(config: ModelConfig) -> dict[str, Any]:
    types = {} if config.slides is None else {"layer_types": layer_types(config)}
    return {"sliding_window": config.sliding_window} | types


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types` of config.json."""
    kinds = ("full_attention", "sliding_attention")
    return [kinds[config.window(layer) is not None] for layer in range(config.num_layers)]


MISTRAL = Family("mistral", "MistralForCausalLM", DEFAULTS, read, write)
