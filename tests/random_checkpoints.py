"""Tiny random Hugging Face checkpoints of every supported kind, and an independent PyTorch forward pass."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

LAYERS = 2
_DIMS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "hidden_act": "relu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_PROSPARSE = _DIMS | {
    "architectures": ["SparseLlamaForCausalLM"],
    "model_type": "sparsellama",
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.01,
    "num_key_value_heads": 4,
}
_BAMBOO = _DIMS | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "sliding_window": 6}
_LLAMA = _DIMS | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_QWEN2 = _DIMS | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 4,
    "max_window_layers": 1,
    "rms_norm_eps": 1e-6,
}
_MISTRAL = _DIMS | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 6}

ROWS: dict[str, dict[str, Any]] = {
    "SparseLLM/prosparse-llama-2-7b": _PROSPARSE,
    "SparseLLM/prosparse-llama-2-13b": _PROSPARSE
    | {"hidden_size": 40, "num_attention_heads": 5}
    | {"num_key_value_heads": 5},
    "SparseLLM/ReluLLaMA-7B": _LLAMA | {"max_position_embeddings": 64},
    "PowerInfer/Bamboo-base-v0_1": _BAMBOO,
    "Tiiny/Bamboo-DPO-v0_1": _BAMBOO,
    "Tiiny/TurboSparse-Mistral-Instruct": _BAMBOO | {"vocab_size": 66},
    "Tiiny/SparseQwen2-7B": _QWEN2 | {"rope_theta": 10000.0},
    "openbmb/MiniCPM-S-1B-sft": _DIMS
    | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.03,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    },
    "openbmb/MiniCPM-S-1B-sft-llama-format": _LLAMA,
    "dense-llama": _LLAMA | {"hidden_act": "silu"},
    "dense-mistral": _MISTRAL | {"hidden_act": "silu", "rope_theta": 1e6},
    "dense-qwen2": _QWEN2 | {"hidden_act": "silu", "rope_theta": 1e6},
}
"""config.json of every row of the table of supported checkpoints, in the spelling they are published in, shrunk."""

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_SCALING = {"type": "linear", "factor": 4.0}


def new_spelling(config: dict) -> dict:
    """The same configuration as transformers 5 writes it."""
    config = dict(config)
    scaling = dict(config.pop("rope_scaling", None) or {})
    rope = {"rope_theta": config.pop("rope_theta", 1e4), "rope_type": scaling.pop("type", "default")} | scaling
    return config | {"rope_parameters": rope, "dtype": config.pop("torch_dtype")}


def is_tied(config: dict) -> bool:
    return config.get("tie_word_embeddings", config["model_type"] == "minicpm")


def random_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 tensors under their Hugging Face names, scaled so that logits have a spread of about 1."""
    rng = torch.Generator().manual_seed(seed)
    width, ffn = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows, columns, scale=1.0):
        return torch.randn(rows, columns, generator=rng) * (scale / math.sqrt(columns))

    def norm():
        return 1 + 0.2 * torch.randn(width, generator=rng)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], width, math.sqrt(width))}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = norm()
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = matrix(rows, width, 2.0)
            if config["model_type"] == "qwen2":
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = torch.randn(rows, generator=rng)
        tensors[prefix + "self_attn.o_proj.weight"] = matrix(width, q)
        tensors[prefix + "post_attention_layernorm.weight"] = norm()
        tensors[prefix + "mlp.gate_proj.weight"] = matrix(ffn, width)
        tensors[prefix + "mlp.up_proj.weight"] = matrix(ffn, width)
        tensors[prefix + "mlp.down_proj.weight"] = matrix(width, ffn)
    tensors["model.norm.weight"] = norm()
    if not is_tied(config):
        tensors["lm_head.weight"] = matrix(config["vocab_size"], width)
    return tensors


def turbosparse_extras(config: dict) -> dict[str, torch.Tensor]:
    """The checkpoint's own predictors and rotary buffers, which conversion leaves out."""
    width, ffn = config["hidden_size"], config["intermediate_size"]
    extras = {}
    for layer in range(config["num_hidden_layers"]):
        extras[f"model.layers.{layer}.mlp.predictor.fc1.weight"] = torch.ones(4, width)
        extras[f"model.layers.{layer}.mlp.predictor.fc2.weight"] = torch.ones(ffn, 4)
        extras[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return extras


def write(directory: Path, config: dict, tensors: dict[str, torch.Tensor], files: str = "safetensors") -> Path:
    """Write a checkpoint by hand: `files` is safetensors, safetensors-shards, bin or bin-shards."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    kind, _, sharded = files.partition("-")
    save = save_file if kind == "safetensors" else torch.save
    single = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    if not sharded:
        save(tensors, directory / single)
        return directory
    names, weight_map = sorted(tensors), {}
    for shard in range(3):
        stem, suffix = single.split(".")
        file = f"{stem}-{shard + 1:05}-of-00003.{suffix}"
        save({name: tensors[name] for name in names[shard::3]}, directory / file)
        weight_map |= dict.fromkeys(names[shard::3], file)
    (directory / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def write_with_transformers(directory: Path, config: dict, seed: int = 0) -> transformers.PreTrainedModel:
    """Write a checkpoint through transformers' own class and return the model, in float32."""
    model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config)).float()
    tensors = random_tensors(config, seed)
    absent = model.load_state_dict(tensors, strict=False)
    assert not absent.unexpected_keys
    assert set(absent.missing_keys) <= {"lm_head.weight"}
    model.save_pretrained(directory)
    return model.eval()


def row(directory: Path, name: str, **options: Any) -> Path:
    """Write a row of `ROWS` into a folder of the repository's short name inside `directory`."""
    config = ROWS[name]
    tensors = random_tensors(config)
    if "TurboSparse" in name:
        tensors |= turbosparse_extras(config)
    return write(directory / name.rpartition("/")[2], config, tensors, **options)


def tokens(config: dict, length: int = 24, batch: int = 2) -> np.ndarray:
    """Random token ids (batch, length), int32."""
    return np.random.default_rng(7).integers(0, config["vocab_size"], (batch, length), dtype=np.int32)


def torch_logits(config: dict, tensors: dict[str, torch.Tensor], ids: np.ndarray, kind: str) -> np.ndarray:
    """Logits (B, T, V) in float64, written from the published definitions; `kind` is the FFN's."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    width, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    size, length = width // heads, ids.shape[1]
    threshold = config.get("hidden_act_param", 0.0) if kind == "fatrelu" else 0.0
    is_minicpm = config["model_type"] == "minicpm"
    branch = config["scale_depth"] / math.sqrt(config["num_hidden_layers"]) if is_minicpm else 1.0

    def norm(x, name):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[name]

    position = torch.arange(length).double()
    inverse = config.get("rope_theta", 1e4) ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.cat([torch.outer(position, inverse)] * 2, -1)

    def rotate(x):
        turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * angle.cos() + turned * angle.sin()

    distance = position[:, None] - position[None, :]
    hidden = (distance < 0) | (distance >= config["sliding_window"] if "sliding_window" in config else distance < 0)
    x = w["model.embed_tokens.weight"][torch.from_numpy(ids).long()] * (config["scale_emb"] if is_minicpm else 1)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{p}self_attn.{n}_proj.weight"].T + w.get(f"{p}self_attn.{n}_proj.bias", torch.tensor(0.0)))
            .unflatten(-1, (-1, size))
            .transpose(1, 2)
            for n in "qkv"
        )
        q, k = rotate(q), rotate(k).repeat_interleave(heads // groups, 1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(hidden, -math.inf)
        out = scores.softmax(-1) @ v.repeat_interleave(heads // groups, 1)
        x = x + branch * (out.transpose(1, 2).flatten(2) @ w[p + "self_attn.o_proj.weight"].T)
        h = norm(x, p + "post_attention_layernorm.weight")
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        up = up.clamp(min=0) if kind == "drelu" else up
        x = x + branch * ((gate * (gate > threshold) * up) @ w[p + "mlp.down_proj.weight"].T)
    x = norm(x, "model.norm.weight")
    if is_minicpm:
        x = x / (width / config["dim_model_base"])
    return (x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T).numpy()
