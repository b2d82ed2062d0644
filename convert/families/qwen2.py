"""Qwen2: biases on q, k and v, and a sliding window from a layer on where it is switched on."""

from typing import Any

from convert.families.family import Family, layer_windows
from convert.families.mistral import layer_types
from convert.fields import Fields
from jsparse.model.config import ModelConfig

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _read(fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
    window = fields.number("sliding_window", int, optional=True)
    if not fields.flag("use_sliding_window"):
        window = None
    first = fields.number("max_window_layers", int) if fields.raw.get("layer_types") is None else 0
    found = layer_windows(fields, "qwen2", window, known["num_layers"], first) if window is not None else {}
    return {"attention_bias": "qkv"} | found


def _write(config: ModelConfig) -> dict[str, Any]:
    window = {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    types = {} if config.slides is None else {"layer_types": layer_types(config)}
    return {"sliding_window": config.sliding_window} | window | types


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _DEFAULTS, _read, _write)
