"""Llama, and SparseLlama, its copy with a threshold in the FFN (ProSparse)."""

from typing import Any

from convert.families.family import Family, layer_windows
from convert.fields import Fields
from jsparse.model.config import ModelConfig

DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}


def read(fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
    bias = {"attention_bias": "all"} if fields.flag("attention_bias") else {}
    return bias | layer_windows(fields, "llama", None, known["num_layers"])


def write(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": True} if config.attention_bias == "all" else {}


LLAMA = Family("llama", "LlamaForCausalLM", DEFAULTS, read, write)
SPARSELLAMA = Family("sparsellama", "SparseLlamaForCausalLM", DEFAULTS, read, write)
