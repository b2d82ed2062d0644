"""Hugging Face `config.json` as a `ModelConfig`.

An absent key means what the architecture's own configuration class takes for it (transformers 5.23 for llama, mistral
and qwen2; the published configuration classes for bamboo and minicpm; llama's for sparsellama). Both spellings are
read: `rope_parameters` of transformers 5, and the older `rope_theta` with `rope_scaling`. The weights' dtype is taken
from the weights.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

from convert.errors import ConversionError
from convert.fields import Fields
from convert.files import read_json
from jsparse.errors import listing
from jsparse.model.config import PRESETS, ModelConfig, RopeScaling
from jsparse.model.ffn import KINDS

_LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = _LLAMA | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "sparsellama": _LLAMA,
    "mistral": _MISTRAL,
    "bamboo": _MISTRAL,
    "qwen2": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "minicpm": _LLAMA | {"tie_word_embeddings": True},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "sparsellama": "SparseLlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "bamboo": "BambooForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
}
_OWNERS = "|".join({re.escape(name.lower().partition("/")[0]) for name in PRESETS})
_REPOSITORY = re.compile(rf"^(.*/|models--[^/]*?--|({_OWNERS})_{{1,2}})")
"""What stands before a repository's own name in a path's last part."""
_ACTIVATIONS: dict[str, str] = {"relu": "reglu", "fatrelu": "fatrelu", "silu": "swiglu", "swish": "swiglu"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a checkpoint's configuration says.

    Attributes:
      config: the architecture.
      reason: one sentence: which FFN kind was taken and why.
      doubtful: whether the sentence is a warning that another kind may be meant.
    """

    config: ModelConfig
    reason: str
    doubtful: bool


def read_config(directory: Path, ffn: str | None = None) -> Reading:
    """Read the configuration of a Hugging Face directory.

    Args:
      directory: holds config.json and perhaps generation_config.json.
      ffn: the FFN kind, where config.json does not tell the truth; None takes what the checkpoint says.

    Raises:
      ConversionError: a file cannot be read, the architecture or activation is unknown, a key is missing (all of them
        listed), or something is asked for that is not implemented (all of them listed).
    """
    path = directory / "config.json"
    raw = read_json(path)
    model_type = _model_type(path, raw)
    fields = Fields(_DEFAULTS[model_type] | raw)
    generation = directory / "generation_config.json"
    tokens = read_json(generation) if os.path.lexists(generation) else {}

    repository = _repository(directory, raw)
    kind, threshold, reason, doubtful = _choose_ffn(fields, model_type, repository, ffn)
    _refuse_unimplemented(fields, model_type)
    theta, scaling = _rope(fields)
    architecture = {
        "hidden_size": fields.number("hidden_size", int),
        "intermediate_size": fields.number("intermediate_size", int),
        "num_layers": fields.number("num_hidden_layers", int),
        "num_heads": fields.number("num_attention_heads", int),
        "num_kv_heads": fields.number("num_key_value_heads", int, optional=True),
        "vocab_size": fields.number("vocab_size", int),
        "head_dim": fields.number("head_dim", int, optional=True) or 0,
        "context_length": _context_length(fields, scaling),
        "norm_eps": fields.number("rms_norm_eps", float),
        "tie_embeddings": bool(fields.raw.get("tie_word_embeddings", False)),
        "bos_token_id": next(iter(fields.token_ids("bos_token_id", tokens)), None),
        "eos_token_ids": fields.token_ids("eos_token_id", tokens),
    }
    architecture["num_kv_heads"] = architecture["num_kv_heads"] or architecture["num_heads"]
    architecture["sliding_window"] = _sliding_window(fields, model_type, architecture["num_layers"])
    within = range(architecture["vocab_size"])  # -1 and the like stand for no token
    architecture["eos_token_ids"] = tuple(token for token in architecture["eos_token_ids"] if token in within)
    if architecture["bos_token_id"] not in within:
        architecture["bos_token_id"] = None
    if model_type == "minicpm":
        architecture |= _minicpm_scales(fields, architecture)
    heads, width = architecture["num_heads"], architecture["hidden_size"]
    if not fields.raw.get("head_dim") and heads > 0 and width % heads:
        fields.problems.append(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    if fields.missing:
        fields.problems.insert(0, f"missing {listing(fields.missing)}")
    if fields.problems:
        raise ConversionError(f"{path}: {'; '.join(fields.problems)}")
    try:
        config = ModelConfig(
            **architecture,
            ffn_kind=kind,
            ffn_threshold=threshold,
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=model_type == "qwen2",
            name=repository or str(raw.get("_name_or_path") or directory.absolute().name),
        )
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from None
    return Reading(config, reason, doubtful)


def _model_type(path: Path, raw: dict) -> str:
    known = {architecture: model_type for model_type, architecture in ARCHITECTURES.items()}
    architectures = raw.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    model_type = str(raw.get("model_type") or known.get(architecture, architecture))
    if model_type not in _DEFAULTS:
        raise ConversionError(
            f"{path}: unknown architecture {model_type!r}; the known model types are {', '.join(_DEFAULTS)}"
        )
    return model_type


def _repository(directory: Path, raw: dict) -> str | None:
    """The known repository a checkpoint came from, by `_name_or_path`, directory name or Hugging Face cache folder."""
    places = (directory.absolute(), directory.resolve(), (directory / "config.json").resolve().parent)
    names = [str(raw.get("_name_or_path") or "").rstrip("/"), *(place.name for place in places)]
    # Hugging Face's cache: models--owner--name/snapshots/revision, and blobs that its files are links to.
    names += [place.parent.parent.name for place in places if place.parent.name == "snapshots"]
    names += [place.parent.name for place in places if place.name == "blobs"]
    known = {name.lower().rpartition("/")[2]: name for name in PRESETS}
    # Tools write owner/name as models--owner--name, owner__name and owner_name.
    said = (_REPOSITORY.sub("", name.lower()) for name in names)
    return next((known[name] for name in said if name in known), None)


def _choose_ffn(
    fields: Fields, model_type: str, repository: str | None, override: str | None
) -> tuple[str, float, str, bool]:
    """The FFN kind, its threshold, the sentence that says why, and whether another kind may be meant."""
    if override is not None and override not in tuple(KINDS):
        raise ConversionError(f"ffn is {override!r} and must be one of {', '.join(KINDS)}")
    declared = str(fields.raw.get("hidden_act") or "silu")
    preset = PRESETS.get(repository or "")
    own = fields.raw.get("ffn_kind")
    doubtful = False
    if override is not None:
        kind, why = override, f"asked for; config.json declares {model_type} with {declared}"
    elif own is not None:
        kind, why = own, "config.json, written by jsparse, says so"
        if own not in tuple(KINDS):
            fields.problems.append(f"ffn_kind is {own!r} and must be one of {', '.join(KINDS)}")
    elif model_type == "bamboo":
        kind, why = "drelu", "bamboo models apply ReLU to both gate_proj and up_proj"
    elif declared == "relu" and preset is not None and preset.ffn_kind == "drelu":
        kind, why = "drelu", f"recognised as {repository}, although config.json declares {model_type} with relu"
    elif declared == "relu" and model_type == "qwen2":
        kind, doubtful = "reglu", True
        why = "config.json declares qwen2 with relu; models derived from SparseQwen2 need --ffn drelu (ffn='drelu')"
    elif declared in _ACTIVATIONS:
        kind, why = _ACTIVATIONS[declared], f"config.json declares {model_type} with {declared}"
    else:
        kind, why = "reglu", ""
        known = ", ".join(_ACTIVATIONS)
        fields.problems.append(f"unknown activation hidden_act {declared!r}; known are {known}, or give --ffn")
    threshold = 0.0
    if kind == "fatrelu":
        known_threshold = preset.ffn_threshold if preset is not None and preset.ffn_kind == "fatrelu" else None
        threshold = fields.number("hidden_act_param", float, optional=known_threshold is not None)
        threshold = known_threshold if threshold is None else threshold
        why += f", threshold {threshold:g}"
    return kind, threshold, f"FFN kind {kind}: {why}.", doubtful


def _refuse_unimplemented(fields: Fields, model_type: str) -> None:
    reasons = {
        "attention_bias": "biases on all attention projections are not implemented",
        "mlp_bias": "biases in the FFN are not implemented",
        "quantization_config": "the weights are quantised; convert the unquantised checkpoint",
    }
    if model_type == "qwen2":
        del reasons["attention_bias"]
    for key, reason in reasons.items():
        if fields.raw.get(key):
            fields.problems.append(f"{key} is set: {reason}")


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    rope = fields.mapping("rope_parameters") | fields.mapping("rope_scaling")
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        fields.problems.append(f"rope_parameters differ by layer type ({listing(nested)}), which is not implemented")
    outer = {key: fields.raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = {key: value for key, value in (outer | rope).items() if value is not None}
    theta = fields.number("rope_theta", float, {"rope_theta": 1e4} | rope)
    if rope.get("partial_rotary_factor", 1) != 1:
        fields.problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']}: only 1 is implemented")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", fields.number("factor", float, rope))
    if kind == "llama3":
        rope = {"original_max_position_embeddings": fields.raw["max_position_embeddings"]} | rope
        scaling = RopeScaling(
            "llama3",
            fields.number("factor", float, rope),
            fields.number("low_freq_factor", float, rope),
            fields.number("high_freq_factor", float, rope),
            fields.number("original_max_position_embeddings", int, rope),
        )
        if not fields.missing and scaling.high_freq_factor <= scaling.low_freq_factor:
            fields.problems.append("rope scaling: high_freq_factor must be greater than low_freq_factor")
        return theta, scaling
    fields.problems.append(f"rope scaling {kind!r} is not implemented; linear and llama3 are")
    return theta, None


def _context_length(fields: Fields, scaling: RopeScaling | None) -> int:
    """Positions that the model was trained for. A linear scaling extends the length that is given, unless the original
    length stands beside it: vicuna-7b-v1.5-16k says 4096 and a factor of 4."""
    length = fields.number("max_position_embeddings", int)
    rope = fields.mapping("rope_parameters") | fields.mapping("rope_scaling")
    if scaling is None or scaling.kind != "linear" or rope.get("original_max_position_embeddings"):
        return length
    return max(length, round(length * scaling.factor))


def _sliding_window(fields: Fields, model_type: str, layers: int) -> int | None:
    """The window of all layers, None where they see all; what differs by layer is a problem."""
    window = None
    if model_type in ("mistral", "bamboo", "qwen2"):
        window = fields.number("sliding_window", int, optional=True)
    if window is not None and window < 1:
        fields.problems.append(f"sliding_window is {window} and must be at least 1 or null")
    for key in ("interleaved_sliding_window", "sliding_window_pattern", "no_rope_layers", "no_rope_layer_interval"):
        if fields.raw.get(key):
            fields.problems.append(f"{key} is set: attention that differs by layer is not implemented")
    if model_type == "qwen2" and not fields.raw.get("use_sliding_window"):
        window = None
    types = fields.raw.get("layer_types")
    if types is None and model_type != "qwen2":
        return window
    if types is None:  # Qwen2 slides from a layer on
        first = fields.number("max_window_layers", int)
        kinds = {"full_attention"} if first > 0 else set()
        kinds |= {"sliding_attention"} if first < layers else set()
    else:
        kinds = set(map(str, types)) if isinstance(types, list) and len(types) == layers else {"other"}
    if not kinds <= {"sliding_attention", "full_attention"}:
        fields.problems.append(f"layer_types is {types!r}, not sliding_attention or full_attention for each layer")
        return window
    if kinds == {"full_attention"} or (model_type == "qwen2" and window is None):
        return None
    if len(kinds) > 1:
        fields.problems.append(
            "a sliding window on some layers only (max_window_layers, layer_types) is not implemented"
        )
    elif window is None:
        fields.problems.append(f"layer_types asks for a sliding window, which {model_type} has none of here")
    return window


def _minicpm_scales(fields: Fields, architecture: dict) -> dict[str, float]:
    scales = {
        "embed_scale": fields.number("scale_emb", float),
        "residual_scale": fields.number("scale_depth", float),
        "logit_scale": fields.number("dim_model_base", float),
    }
    scales["residual_scale"] /= math.sqrt(max(architecture["num_layers"], 1))
    scales["logit_scale"] /= max(architecture["hidden_size"], 1)
    return scales
