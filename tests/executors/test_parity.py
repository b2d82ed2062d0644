"""Logits agree with transformers, and with a plain PyTorch forward where transformers has no class."""

import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints
import torch
from conftest import run_decoder
from random_checkpoints import LINEAR_SCALING, LLAMA3_SCALING, ROWS

from convert import from_huggingface, to_huggingface
from jsparse.executors.xla import activate
from jsparse.model.ffn import KINDS
from jsparse.model.weights import Params

TOLERANCE = 1e-4
"""Absolute, for float32 logits of spread 1."""


def logits_of(params: Params, ids: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of our decoder, through the reference executor."""
    return np.asarray(run_decoder(params, ids)[0])


def transformers_logits(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert theirs.std() > 0.3, "logits too small for the comparison to mean anything"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


TRANSFORMERS = {
    "relu llama": ROWS["SparseLLM/ReluLLaMA-7B"],
    "silu llama": ROWS["dense-llama"],
    "head_dim llama": ROWS["SparseLLM/ReluLLaMA-7B"] | {"head_dim": 16},
    "tied llama": ROWS["SparseLLM/ReluLLaMA-7B"] | {"tie_word_embeddings": True},
    "llama3 scaling": ROWS["SparseLLM/ReluLLaMA-7B"] | {"rope_scaling": LLAMA3_SCALING, "rope_theta": 100.0},
    "linear scaling": ROWS["SparseLLM/ReluLLaMA-7B"] | {"rope_scaling": LINEAR_SCALING},
    "silu mistral past its window": ROWS["dense-mistral"],
    "relu mistral past its window": ROWS["dense-mistral"] | {"hidden_act": "relu"},
    "mistral without window": ROWS["dense-mistral"] | {"sliding_window": None},
    "relu qwen2": ROWS["Tiiny/SparseQwen2-7B"],
    "silu qwen2": ROWS["dense-qwen2"],
    "tied qwen2": ROWS["Tiiny/SparseQwen2-7B"] | {"tie_word_embeddings": True},
    "qwen2 with window": ROWS["Tiiny/SparseQwen2-7B"] | {"use_sliding_window": True, "max_window_layers": 0},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_logits_agree_with_transformers(name, tmp_path):
    config = TRANSFORMERS[name]
    model = random_checkpoints.write_with_transformers(tmp_path / "model", config)
    ids = random_checkpoints.tokens(config)
    assert_close(logits_of(from_huggingface(tmp_path / "model"), ids), transformers_logits(model, ids))


@pytest.mark.parametrize(
    ("changed", "base"),
    [
        ("llama3 scaling", {"rope_scaling": None}),
        ("linear scaling", {"rope_scaling": None}),
        ("silu mistral past its window", {"sliding_window": None}),
        ("qwen2 with window", {"use_sliding_window": False}),
    ],
)
def test_the_compared_feature_changes_the_logits(changed, base, tmp_path):
    config = TRANSFORMERS[changed]
    with_feature = random_checkpoints.write(tmp_path / "a", config, random_checkpoints.random_tensors(config))
    without = random_checkpoints.write(tmp_path / "b", config | base, random_checkpoints.random_tensors(config))
    ids = random_checkpoints.tokens(config)
    difference = logits_of(from_huggingface(with_feature), ids) - logits_of(from_huggingface(without), ids)
    assert np.abs(difference).max() > 100 * TOLERANCE


TORCH = {
    "Tiiny/Bamboo-DPO-v0_1": "drelu",
    "Tiiny/TurboSparse-Mistral-Instruct": "drelu",
    "Tiiny/SparseQwen2-7B": "drelu",
    "SparseLLM/prosparse-llama-2-7b": "fatrelu",
    "openbmb/MiniCPM-S-1B-sft": "fatrelu",
}


@pytest.mark.parametrize("name", TORCH)
def test_logits_agree_with_plain_pytorch(name, tmp_path):
    config = dict(ROWS[name])
    if TORCH[name] == "fatrelu":
        config["hidden_act_param"] = 0.3
    if config["model_type"] == "qwen2":
        del config["sliding_window"]
    tensors = random_checkpoints.random_tensors(config)
    directory = random_checkpoints.write(tmp_path / name.rpartition("/")[2], config, tensors)
    ids = random_checkpoints.tokens(config)
    expected = random_checkpoints.torch_logits(config, tensors, ids, TORCH[name])
    assert_close(logits_of(from_huggingface(directory), ids), expected)
    as_reglu = logits_of(from_huggingface(directory, ffn="reglu"), ids)
    assert np.abs(as_reglu - expected).max() > 1000 * TOLERANCE


@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.03), ("int4", 0.3)])
def test_low_bit_logits_stay_close(dtype, bound, tmp_path):
    name = "Tiiny/SparseQwen2-7B"
    directory, ids = random_checkpoints.row(tmp_path, name), random_checkpoints.tokens(ROWS[name])
    difference = logits_of(from_huggingface(directory, dtype=dtype), ids) - logits_of(from_huggingface(directory), ids)
    assert 0 < difference.std() < bound


def test_plain_pytorch_agrees_with_transformers(tmp_path):
    """The judge of the kinds transformers lacks is itself right on one it has."""
    config = ROWS["dense-mistral"] | {"hidden_act": "relu"}
    model = random_checkpoints.write_with_transformers(tmp_path / "model", config)
    ids = random_checkpoints.tokens(config)
    expected = random_checkpoints.torch_logits(config, random_checkpoints.random_tensors(config), ids, "reglu")
    np.testing.assert_allclose(transformers_logits(model, ids), expected, atol=TOLERANCE, rtol=0)


def test_fatrelu_keeps_what_is_strictly_greater():
    gate = jnp.asarray([-1, 0.2, 0.25, 0.5], jnp.float32)
    np.testing.assert_array_equal(activate(KINDS["fatrelu"], gate, jnp.float32(0.25)), np.float32([0, 0, 0, 0.5]))


@pytest.mark.parametrize("name", ["relu llama", "tied llama", "llama3 scaling", "linear scaling", "relu qwen2"])
def test_transformers_loads_what_we_export(name, tmp_path):
    import transformers

    config = TRANSFORMERS[name]
    model = random_checkpoints.write_with_transformers(tmp_path / "model", config)
    to_huggingface(from_huggingface(tmp_path / "model"), tmp_path / "exported")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="float32").eval()
    ids = random_checkpoints.tokens(config)
    np.testing.assert_array_equal(transformers_logits(loaded, ids), transformers_logits(model, ids))
