"""The architecture of a model: one frozen dataclass and a preset for every supported checkpoint."""

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

from jsparse.errors import JsparseError
from jsparse.model.ffn import KINDS, FFNSpec, Pipeline
from jsparse.options import is_number, is_whole

_ScalingKind = Literal["linear", "llama3", "yarn"]
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "head_dim",
    "context_length",
)
"""Fields that are whole numbers from 1 on."""
_NUMBERS = ("ffn_threshold", "rope_theta", "norm_eps", "embed_scale", "residual_scale", "logit_scale")
"""Fields that are finite numbers."""
_MOST_LAYERS = 10_000
"""No model has as many. Lists of a damaged file's billions of layers would take all memory before anything is read."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary position scaling: `linear` divides positions, `llama3` and `yarn` stretch the low frequencies only."""

    kind: _ScalingKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclasses.dataclass(frozen=True)
class Experts:
    """FFNs of which a router chooses some for each token.

    Attributes:
      count: how many there are; `intermediate_size` is of each.
      active: how many a token takes.
      weighting: what makes weights of the router's logits, which are then normalised over the chosen.
    """

    count: int
    active: int
    weighting: Literal["softmax", "sigmoid"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: norm and rotary attention with grouped key/value heads, norm and FFN, residual branches.

    It can say more than is computed: `unimplemented` names what no executor does yet.

    `ffn_kind` is explicit because checkpoints do not say it reliably (SparseQwen2 declares `relu` and means `drelu`).
    `embed_scale`, `residual_scale` and `logit_scale` are MiniCPM's factors on the embeddings, on every residual branch
    and on the final hidden state before the head.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    head_dim: int = 0
    """0 stands for hidden_size / num_heads."""
    context_length: int = 4096
    ffn_kind: str = "reglu"
    """One of `KINDS`."""
    ffn_threshold: float = 0.0
    """FATReLU keeps a gate value when it is greater than this; 0 for every other kind."""
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Which projections have one."""
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""
    slides: tuple[bool, ...] | None = None
    """Whether each layer has the sliding window; None for all of them. The others see all positions."""
    rotates: tuple[bool, ...] | None = None
    """Whether each layer has rotary positions; None for all of them. The others have none."""
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    """A norm of every head's query and key before the rotation."""
    rotary_dim: int = 0
    """Of each head's dimensions, those that rotate; 0 stands for all."""
    ffn_bias: bool = False
    experts: Experts | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), np.generic):
                object.__setattr__(self, field.name, value.item())
        self._check_types()
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        for field in ("slides", "rotates"):
            if (flags := getattr(self, field)) is not None:
                object.__setattr__(self, field, None if all(flags) else tuple(map(bool, flags)))
        if not self.head_dim and self.num_heads >= 1:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        problems = [
            f"{field} is {getattr(self, field)} and must be at least 1" for field in _SIZES if getattr(self, field) < 1
        ]
        problems += [
            f"{field} is {getattr(self, field)}, more than positions of 32 bits can count"
            for field in ("context_length", "sliding_window")
            if (getattr(self, field) or 0) >= 2**31
        ]
        if self.num_layers > _MOST_LAYERS:
            problems.append(f"num_layers is {self.num_layers}, more than {_MOST_LAYERS}")
        if self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim} and must be even for rotary positions")
        if not self.rope_theta > 0:
            problems.append(f"rope_theta is {self.rope_theta} and must be greater than 0")
        if self.rope_scaling is not None and not self.rope_scaling.factor > 0:
            problems.append(f"the rope scaling factor is {self.rope_scaling.factor} and must be greater than 0")
        if not self.norm_eps >= 0:
            problems.append(f"norm_eps is {self.norm_eps} and must be at least 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            problems.append(f"sliding_window is {self.sliding_window} and must be at least 1, or None")
        problems += [
            f"{field} has {len(flags)} layers, the model {self.num_layers}"
            for field in ("slides", "rotates")
            if (flags := getattr(self, field)) is not None and len(flags) != self.num_layers
        ]
        for field, known in (("attention_bias", ("none", "qkv", "all")), ("norm", ("rms", "layer"))):
            if getattr(self, field) not in known:
                problems.append(f"{field} is {getattr(self, field)!r} and must be one of {', '.join(known)}")
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            problems.append(f"rotary_dim is {self.rotary_dim} and must be even and at most head_dim {self.head_dim}")
        if self.experts is not None and not 1 <= self.experts.active <= self.experts.count:
            problems.append(f"a token takes {self.experts.active} of {self.experts.count} experts")
        if self.ffn_kind not in tuple(KINDS):
            problems.append(f"ffn_kind is {self.ffn_kind!r} and must be one of {', '.join(KINDS)}")
        if self.ffn_threshold and self.ffn_kind != "fatrelu":
            problems.append(f"ffn_threshold is {self.ffn_threshold}, but {self.ffn_kind} has none")
        if problems:
            raise JsparseError("model config: " + "; ".join(problems))

    def _check_types(self) -> None:
        """Raises: JsparseError: values are of the wrong types; all are listed."""
        windows = () if self.sliding_window is None else ("sliding_window",)
        problems = [
            f"{field} is {getattr(self, field)!r} and must be a whole number"
            for field in (*_SIZES, "rotary_dim", *windows)
            if not is_whole(getattr(self, field))
        ]
        problems += [
            f"{field} is {getattr(self, field)!r} and must be a finite number"
            for field in _NUMBERS
            if not is_number(getattr(self, field)) or not math.isfinite(getattr(self, field))
        ]
        ids = self.eos_token_ids
        if not isinstance(ids, list | tuple) or not all(map(is_whole, ids)):
            problems.append(f"eos_token_ids is {ids!r} and must be a list of token ids")
        for field in ("slides", "rotates"):
            if not isinstance(flags := getattr(self, field), list | tuple | None):
                problems.append(f"{field} is {flags!r} and must be a list of true and false, one per layer, or None")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            problems.append(f"rope_scaling is {self.rope_scaling!r} and must be a RopeScaling or None")
        elif self.rope_scaling is not None and self.rope_scaling.kind not in get_args(_ScalingKind):
            known = ", ".join(get_args(_ScalingKind))
            problems.append(f"rope_scaling is of kind {self.rope_scaling.kind!r} and must be one of {known}")
        if problems:
            raise JsparseError("model config: " + "; ".join(problems))

    @property
    def is_sparse(self) -> bool:
        """Whether the FFN zeroes neurons, so that predictors can be fitted."""
        return self.ffn_spec().has_zeros

    def window(self, layer: int) -> int | None:
        """Positions that a token of this layer sees, itself included; None for all."""
        return self.sliding_window if self.slides is None or self.slides[layer] else None

    def has_rotation(self, layer: int) -> bool:
        """Whether this layer's queries and keys rotate with their positions."""
        return self.rotates is None or self.rotates[layer]

    def unimplemented(self) -> str | None:
        """What of the model no executor computes yet, or None."""
        wanted = {
            "layer norms": self.norm != "rms",
            "norms of queries and keys": self.qk_norm,
            "rotation of some dimensions only": self.rotary_dim not in (0, self.head_dim),
            "yarn rope scaling": self.rope_scaling is not None and self.rope_scaling.kind == "yarn",
            "biases in the FFN": self.ffn_bias,
            "experts": self.experts is not None,
        }
        found = [what for what, is_wanted in wanted.items() if is_wanted]
        return f"not implemented: {', '.join(found)}" if found else None

    def ffn_spec(self, pipeline: Pipeline = "sequential") -> FFNSpec:
        """What the FFN computes, and how sparsely."""
        return dataclasses.replace(KINDS[self.ffn_kind], pipeline=pipeline)

    def to_dict(self) -> dict:
        """A JSON-serialisable dictionary; `from_dict` is its inverse.

        It has the fields of version 0.1, and of the later ones those that are not at their default: what 0.1 wrote of a
        model is what identifies it still.
        """
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "attention_bias" and value != "all":
                fields["qkv_bias"] = value == "qkv"
            elif field.name not in _LATER or value != field.default:
                fields[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        return fields

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """Rebuild a config from `to_dict`.

        Raises:
          JsparseError: a field is unknown or missing, all of them listed.
        """
        fields = dict(fields)
        if "qkv_bias" in fields:
            fields["attention_bias"] = "qkv" if fields.pop("qkv_bias") else "none"
        known = {field.name for field in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        problems = [f"unknown field {name!r}" for name in sorted(fields.keys() - known)]
        problems += [f"missing field {name!r}" for name in sorted(required - fields.keys())]
        if problems:
            raise JsparseError("model config: " + "; ".join(problems))
        for name, kind in (("rope_scaling", RopeScaling), ("experts", Experts)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        return cls(**fields)


_LATER = ("slides", "rotates", "norm", "qk_norm", "rotary_dim", "ffn_bias", "experts")
"""Fields that version 0.1 did not have."""

_LLAMA2_7B = ModelConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    vocab_size=32000,
)
_MISTRAL_7B = ModelConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=32000,
    ffn_kind="drelu",
    sliding_window=4096,
)
_MINICPM_1B = ModelConfig(
    hidden_size=1536,
    intermediate_size=3840,
    num_layers=52,
    num_heads=24,
    num_kv_heads=8,
    vocab_size=73440,
)

PRESETS: dict[str, ModelConfig] = {
    "SparseLLM/prosparse-llama-2-7b": dataclasses.replace(_LLAMA2_7B, ffn_kind="fatrelu", ffn_threshold=0.01),
    "SparseLLM/prosparse-llama-2-13b": ModelConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        vocab_size=32000,
        ffn_kind="fatrelu",
        ffn_threshold=0.01,
    ),
    "SparseLLM/ReluLLaMA-7B": dataclasses.replace(_LLAMA2_7B, context_length=2048),
    "PowerInfer/Bamboo-base-v0_1": _MISTRAL_7B,
    "Tiiny/Bamboo-DPO-v0_1": _MISTRAL_7B,
    "Tiiny/TurboSparse-Mistral-Instruct": dataclasses.replace(_MISTRAL_7B, vocab_size=32064),
    "Tiiny/SparseQwen2-7B": ModelConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        vocab_size=152064,
        ffn_kind="drelu",
        norm_eps=1e-6,
        attention_bias="qkv",
        context_length=32768,
    ),
    "openbmb/MiniCPM-S-1B-sft": dataclasses.replace(
        _MINICPM_1B,
        ffn_kind="fatrelu",
        ffn_threshold=0.03,
        embed_scale=12.0,
        residual_scale=1.4 / 52**0.5,
        logit_scale=256 / 1536,
        tie_embeddings=True,
    ),
    "openbmb/MiniCPM-S-1B-sft-llama-format": _MINICPM_1B,
}
PRESETS = {name: dataclasses.replace(config, name=name) for name, config in PRESETS.items()}
