"""The architecture of a model: one frozen dataclass and a preset for every supported checkpoint."""

import dataclasses
from typing import Literal

from jsparse.errors import JsparseError
from jsparse.model.ffn import KINDS, FFNSpec, Pipeline


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary position scaling: `linear` divides positions, `llama3` stretches the low frequencies only."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: RMSNorm, rotary attention with grouped key/value heads, gated FFN.

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
    qkv_bias: bool = False
    tie_embeddings: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = ""

    def __post_init__(self):
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if not self.head_dim and self.num_heads >= 1:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        problems = [
            f"{field} is {getattr(self, field)} and must be at least 1"
            for field in (
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "vocab_size",
                "head_dim",
                "context_length",
            )
            if getattr(self, field) < 1
        ]
        if self.context_length >= 2**31:
            problems.append(f"context_length is {self.context_length}, more than positions of 32 bits can count")
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
        if self.ffn_kind not in tuple(KINDS):
            problems.append(f"ffn_kind is {self.ffn_kind!r} and must be one of {', '.join(KINDS)}")
        if self.ffn_threshold and self.ffn_kind != "fatrelu":
            problems.append(f"ffn_threshold is {self.ffn_threshold}, but {self.ffn_kind} has none")
        if problems:
            raise JsparseError("model config: " + "; ".join(problems))

    @property
    def is_sparse(self) -> bool:
        """Whether the FFN zeroes neurons, so that predictors can be fitted."""
        return self.ffn_spec().has_zeros

    def window(self, layer: int) -> int | None:
        """Positions that a token of this layer sees, itself included; None for all."""
        return self.sliding_window

    def ffn_spec(self, pipeline: Pipeline = "sequential") -> FFNSpec:
        """What the FFN computes, and how sparsely."""
        return dataclasses.replace(KINDS[self.ffn_kind], pipeline=pipeline)

    def to_dict(self) -> dict:
        """A JSON-serialisable dictionary; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """Rebuild a config from `to_dict`.

        Raises:
          JsparseError: a field is unknown or missing, all of them listed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        problems = [f"unknown field {name!r}" for name in sorted(fields.keys() - known)]
        problems += [f"missing field {name!r}" for name in sorted(required - fields.keys())]
        if problems:
            raise JsparseError("model config: " + "; ".join(problems))
        fields = dict(fields)
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return cls(**fields)


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
        qkv_bias=True,
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
