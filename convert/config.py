"""Hugging Face `config.json` as a `ModelConfig`.

An absent key means what the architecture's own configuration class takes for it (transformers 5.23 for llama, mistral
and qwen2; the published configuration classes for bamboo and minicpm; llama's for sparsellama). Both spellings are
read: `rope_parameters` of transformers 5, and the older `rope_theta` with `rope_scaling`. The weights' dtype is taken
from the weights.
"""

import dataclasses
import os
import re
from pathlib import Path

from convert.errors import ConversionError
from convert.families import FAMILIES, Family
from convert.fields import Fields
from convert.files import read_json
from jsparse.errors import listing
from jsparse.model.config import PRESETS, ModelConfig, RopeScaling
from jsparse.model.ffn import HF_KINDS, KINDS

_OWNERS = "|".join({re.escape(name.lower().partition("/")[0]) for name in PRESETS})
_REPOSITORY = re.compile(rf"^(.*/|models--[^/]*?--|({_OWNERS})_{{1,2}})")
"""What stands before a repository's own name in a path's last part."""
_ACTIVATIONS: dict[str, str] = {"relu": "reglu", "fatrelu": "fatrelu", "silu": "swiglu", "swish": "swiglu"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a checkpoint's configuration says.

    Attributes:
      config: the architecture.
      family: of the checkpoint.
      reason: one sentence: which FFN kind was taken and why.
      doubtful: whether the sentence is a warning that another kind may be meant.
    """

    config: ModelConfig
    family: Family
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
    family = _family(path, raw)
    fields = Fields(dict(family.defaults) | raw)
    generation = directory / "generation_config.json"
    tokens = read_json(generation) if os.path.lexists(generation) else {}

    repository = _repository(directory, raw)
    kind, threshold, reason, doubtful = _choose_ffn(fields, family, repository, ffn)
    _refuse_unimplemented(fields)
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
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "bos_token_id": next(iter(fields.token_ids("bos_token_id", tokens)), None),
        "eos_token_ids": fields.token_ids("eos_token_id", tokens),
    }
    architecture["num_kv_heads"] = architecture["num_kv_heads"] or architecture["num_heads"]
    within = range(architecture["vocab_size"])  # -1 and the like stand for no token
    architecture["eos_token_ids"] = tuple(token for token in architecture["eos_token_ids"] if token in within)
    if architecture["bos_token_id"] not in within:
        architecture["bos_token_id"] = None
    architecture |= family.read(fields, architecture)
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
            name=repository or str(raw.get("_name_or_path") or directory.absolute().name),
        )
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from None
    return Reading(config, family, reason, doubtful)


def _family(path: Path, raw: dict) -> Family:
    known = {family.architecture: family.model_type for family in FAMILIES.values()}
    architectures = raw.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    model_type = str(raw.get("model_type") or known.get(architecture, architecture))
    if model_type not in FAMILIES:
        raise ConversionError(
            f"{path}: unknown architecture {model_type!r}; the known model types are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


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
    fields: Fields, family: Family, repository: str | None, override: str | None
) -> tuple[str, float, str, bool]:
    """The FFN kind, its threshold, the sentence that says why, and whether another kind may be meant."""
    if override is not None and override not in HF_KINDS:
        raise ConversionError(f"ffn is {override!r} and must be one of {', '.join(HF_KINDS)}")
    declared, model_type = str(fields.raw.get("hidden_act") or "silu"), family.model_type
    preset = PRESETS.get(repository or "")
    own = fields.raw.get("ffn_kind")
    doubtful = False
    if override is not None:
        kind, why = override, f"asked for; config.json declares {model_type} with {declared}"
    elif own is not None:
        kind, why = own, "config.json, written by jsparse, says so"
        if own not in tuple(KINDS):
            fields.problems.append(f"ffn_kind is {own!r} and must be one of {', '.join(KINDS)}")
    elif family.ffn_kind is not None:
        kind, why = family.ffn_kind, f"{model_type} models apply ReLU to both gate_proj and up_proj"
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


def _refuse_unimplemented(fields: Fields) -> None:
    by_layer = "attention that differs by layer is not implemented"
    reasons = {
        "mlp_bias": "biases in the FFN are not implemented",
        "quantization_config": "the weights are quantised; convert the unquantised checkpoint",
        "interleaved_sliding_window": by_layer,
        "sliding_window_pattern": by_layer,
        "no_rope_layers": by_layer,
        "no_rope_layer_interval": by_layer,
    }
    for key, reason in reasons.items():
        if fields.raw.get(key):
            fields.problems.append(f"{key} is set: {reason}")


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    newer, older = (_named_type(fields.mapping(key)) for key in ("rope_parameters", "rope_scaling"))
    for key in sorted(newer.keys() & older.keys()):
        if newer[key] != older[key]:
            said = f"rope_parameters has {key} {newer[key]!r}, rope_scaling {older[key]!r}"
            fields.problems.append(f"{said}: delete the one that is wrong")
    rope = newer | older
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        fields.problems.append(f"rope_parameters differ by layer type ({listing(nested)}), which is not implemented")
    outer = {key: fields.raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = {key: value for key, value in (outer | rope).items() if value is not None}
    theta = fields.number("rope_theta", float, {"rope_theta": 1e4} | rope)
    if rope.get("partial_rotary_factor", 1) != 1:
        fields.problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']}: only 1 is implemented")
    kind = rope.get("rope_type") or "default"
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
        if not fields.missing and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
            fields.problems.append("rope scaling: low_freq_factor must lie between 0 and high_freq_factor")
        if not fields.missing and scaling.original_context_length < 1:
            fields.problems.append("rope scaling: original_max_position_embeddings must be at least 1")
        return theta, scaling
    fields.problems.append(f"rope scaling {kind!r} is not implemented; linear and llama3 are")
    return theta, None


def _named_type(rope: dict) -> dict:
    """The object without nulls, its type under `rope_type` alone: older files say `type`, some say both."""
    kind = rope.get("rope_type") or rope.get("type")
    return {key: value for key, value in (rope | {"rope_type": kind}).items() if key != "type" and value is not None}


def _context_length(fields: Fields, scaling: RopeScaling | None) -> int:
    """Positions that the model was trained for. A linear scaling extends the length that is given, unless the original
    length stands beside it: vicuna-7b-v1.5-16k says 4096 and a factor of 4."""
    length = fields.number("max_position_embeddings", int)
    rope = fields.mapping("rope_parameters") | fields.mapping("rope_scaling")
    if scaling is None or scaling.kind != "linear" or rope.get("original_max_position_embeddings"):
        return length
    return max(length, round(length * scaling.factor))
