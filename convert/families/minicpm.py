"""MiniCPM: Llama with factors on the embeddings, on what a layer adds, and on the last hidden state."""

import math
from typing import Any

from convert.families import llama
from convert.families.family import Family
from convert.fields import Fields
from jsparse.model.config import ModelConfig


def _read(fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
    return llama.read(fields, known) | {
        "embed_scale": fields.number("scale_emb", float),
        "residual_scale": fields.number("scale_depth", float) / math.sqrt(max(known["num_layers"], 1)),
        "logit_scale": fields.number("dim_model_base", float) / max(known["hidden_size"], 1),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return llama.write(config) | {
        "scale_emb": config.embed_scale,
        "scale_depth": round(config.residual_scale * math.sqrt(config.num_layers), 12),
        "dim_model_base": round(config.logit_scale * config.hidden_size, 9),
    }


MINICPM = Family("minicpm", "MiniCPMForCausalLM", llama.DEFAULTS | {"tie_word_embeddings": True}, _read, _write)
