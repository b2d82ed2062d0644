"""A `ModelConfig` as Hugging Face `config.json`."""

import math

from convert.config import ARCHITECTURES
from convert.errors import ConversionError
from jsparse.errors import listing
from jsparse.model.config import ModelConfig


def write_config(config: ModelConfig, dtype: str) -> dict:
    """config.json for a config, in the spelling that every version of transformers reads, plus `ffn_kind` of our own.

    Raises:
      ConversionError: no transformers architecture has this combination of features.
    """
    scaled = (config.embed_scale, config.residual_scale, config.logit_scale) != (1.0, 1.0, 1.0)
    if config.qkv_bias:
        model_type = "qwen2"
    elif scaled:
        model_type = "minicpm"
    elif config.ffn_kind == "drelu":
        model_type = "bamboo"
    elif config.sliding_window is not None:
        model_type = "mistral"
    else:
        model_type = "sparsellama" if config.ffn_kind == "fatrelu" else "llama"
    unsupported = [
        name
        for name, wanted in (
            ("MiniCPM scales with q/k/v biases", scaled and config.qkv_bias),
            ("an FFN without up_proj", config.ffn_spec().up is None),
            ("MiniCPM scales with a sliding window", scaled and config.sliding_window is not None),
        )
        if wanted
    ]
    if unsupported:
        raise ConversionError(f"no Hugging Face architecture has {listing(unsupported)}")
    return _spelled(config, model_type, dtype)


def _spelled(config: ModelConfig, model_type: str, dtype: str) -> dict:
    scaling = config.rope_scaling
    content = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "_name_or_path": config.name,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "hidden_act": {"swiglu": "silu", "fatrelu": "fatrelu"}.get(config.ffn_kind, "relu"),
        "ffn_kind": config.ffn_kind,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0]
        if len(config.eos_token_ids) == 1
        else list(config.eos_token_ids) or None,
        "torch_dtype": dtype,
    }
    if scaling is not None and scaling.kind == "linear":
        # Written as it is read: the length without the scaling, or, where that is no whole number, both lengths.
        original = config.context_length / scaling.factor
        content["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
        if round(round(original) * scaling.factor) == config.context_length and scaling.factor > 1:
            content["max_position_embeddings"] = round(original)
        else:
            content["rope_scaling"]["original_max_position_embeddings"] = max(1, round(original))
    elif scaling is not None:
        content["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        content["rope_scaling"] |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    if config.ffn_kind == "fatrelu":
        content["hidden_act_param"] = config.ffn_threshold
    if model_type in ("mistral", "bamboo", "qwen2"):
        content["sliding_window"] = config.sliding_window
    if model_type == "qwen2":
        content |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    if model_type == "minicpm":
        content |= {
            "scale_emb": config.embed_scale,
            "scale_depth": round(config.residual_scale * math.sqrt(config.num_layers), 12),
            "dim_model_base": round(config.logit_scale * config.hidden_size, 9),
        }
    return content
