"""A `ModelConfig` as Hugging Face `config.json`."""

from convert.errors import ConversionError
from convert.families import FAMILIES, Family
from jsparse.errors import listing
from jsparse.model.config import ModelConfig


def write_config(config: ModelConfig, dtype: str) -> dict:
    """config.json for a config, in the spelling that every version of transformers reads, plus `ffn_kind` of our own.

    Raises:
      ConversionError: no transformers architecture has this combination of features.
    """
    family, unsupported = family_of(config), []
    if is_scaled(config) and family.model_type != "minicpm":
        unsupported.append("MiniCPM scales with biases on q, k and v alone")
    if is_scaled(config) and config.sliding_window is not None:
        unsupported.append("MiniCPM scales with a sliding window")
    if config.attention_bias == "all" and family.model_type in ("mistral", "bamboo"):
        unsupported.append("biases on all attention projections with a sliding window or ReLU on gate and up")
    if config.ffn_spec().up is None:
        unsupported.append("an FFN without up_proj")
    if config.rotates is not None:
        unsupported.append("rotary positions in some layers only")
    if reason := config.unimplemented():
        raise ConversionError(reason)
    if unsupported:
        raise ConversionError(f"no Hugging Face architecture has {listing(unsupported)}")
    return _spelled(config, family, dtype)


def family_of(config: ModelConfig) -> Family:
    """The family that a model is written as."""
    if config.attention_bias == "qkv":
        return FAMILIES["qwen2"]
    if is_scaled(config):
        return FAMILIES["minicpm"]
    if config.ffn_kind == "drelu":
        return FAMILIES["bamboo"]
    if config.sliding_window is not None:
        return FAMILIES["mistral"]
    return FAMILIES["sparsellama" if config.ffn_kind == "fatrelu" else "llama"]


def is_scaled(config: ModelConfig) -> bool:
    """Whether a model has factors of MiniCPM's."""
    return (config.embed_scale, config.residual_scale, config.logit_scale) != (1.0, 1.0, 1.0)


def _spelled(config: ModelConfig, family: Family, dtype: str) -> dict:
    scaling = config.rope_scaling
    content = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
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
    return content | family.write(config)
