"""Checkpoints of every supported kind convert, survive the round trip, and are read one tensor at a time."""

import dataclasses
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints
import torch
from convert_command import exit_code
from random_checkpoints import LINEAR_SCALING, LLAMA3_SCALING, ROWS, new_spelling

import jsparse
from convert import export_predictors, from_huggingface, import_predictors, to_huggingface
from convert import mapping as convert_mapping
from convert.config import read_config
from convert.tensors import open_checkpoint, read_safetensors
from jsparse.arrays import Rows, Storage, dequantize
from jsparse.model.config import ModelConfig, RopeScaling
from jsparse.model.parameters import by_path
from jsparse.model.weights import FFNWeights, Params, Predictor
from jsparse.rounding import cast, quantize_rows

_LLAMA = ModelConfig(
    32, 48, 2, 4, 2, 64, context_length=128, ffn_kind="reglu", norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2,)
)
_BAMBOO = dataclasses.replace(_LLAMA, ffn_kind="drelu", sliding_window=6)
_PROSPARSE = dataclasses.replace(_LLAMA, ffn_kind="fatrelu", ffn_threshold=0.01, num_kv_heads=4)
EXPECTED = {
    "SparseLLM/prosparse-llama-2-7b": _PROSPARSE,
    "SparseLLM/prosparse-llama-2-13b": dataclasses.replace(
        _PROSPARSE, hidden_size=40, num_heads=5, num_kv_heads=5, head_dim=8
    ),
    "SparseLLM/ReluLLaMA-7B": dataclasses.replace(_LLAMA, context_length=64),
    "PowerInfer/Bamboo-base-v0_1": _BAMBOO,
    "Tiiny/Bamboo-DPO-v0_1": _BAMBOO,
    "Tiiny/TurboSparse-Mistral-Instruct": dataclasses.replace(_BAMBOO, vocab_size=66),
    "Tiiny/SparseQwen2-7B": dataclasses.replace(_LLAMA, ffn_kind="drelu", norm_eps=1e-6, attention_bias="qkv"),
    "openbmb/MiniCPM-S-1B-sft": dataclasses.replace(
        _LLAMA,
        ffn_kind="fatrelu",
        ffn_threshold=0.03,
        embed_scale=12.0,
        residual_scale=1.4 / math.sqrt(2),
        logit_scale=0.5,
        tie_embeddings=True,
    ),
    "openbmb/MiniCPM-S-1B-sft-llama-format": _LLAMA,
    "dense-llama": dataclasses.replace(_LLAMA, ffn_kind="swiglu"),
    "dense-mistral": dataclasses.replace(_LLAMA, ffn_kind="swiglu", sliding_window=6, rope_theta=1e6),
    "dense-qwen2": dataclasses.replace(_LLAMA, ffn_kind="swiglu", norm_eps=1e-6, attention_bias="qkv", rope_theta=1e6),
}


def write_config(directory: Path, config: dict, **generation) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def assert_identical(ours, theirs) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs)):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.mark.parametrize("name", ROWS)
def test_every_checkpoint_of_the_table_converts(name, tmp_path):
    params = from_huggingface(random_checkpoints.row(tmp_path, name))
    assert params.config == dataclasses.replace(EXPECTED[name], name=name)
    assert params.predictors is None
    assert params.tokenizer is None

    tensors = random_checkpoints.random_tensors(ROWS[name])
    assert len(by_path(params.weights)) == len(tensors)
    layer, prefix = params.weights.layers[1], "model.layers.1."
    expected = {
        "model.embed_tokens.weight": params.weights.embed,
        "model.norm.weight": params.weights.norm,
        prefix + "input_layernorm.weight": layer.input_norm,
        prefix + "post_attention_layernorm.weight": layer.post_attention_norm,
        prefix + "mlp.gate_proj.weight": layer.ffn.gate,
        prefix + "mlp.up_proj.weight": layer.ffn.up,
        prefix + "mlp.down_proj.weight": layer.ffn.down_t.T,
    } | {f"{prefix}self_attn.{n}_proj.weight": getattr(layer.attention, n).rows for n in "qkvo"}
    if params.config.attention_bias == "qkv":
        expected |= {f"{prefix}self_attn.{n}_proj.bias": getattr(layer.attention, n).bias for n in "qkv"}
    if not params.config.tie_embeddings:
        expected["lm_head.weight"] = params.weights.head
    for tensor, array in expected.items():
        np.testing.assert_array_equal(np.asarray(array), tensors[tensor].numpy(), err_msg=tensor)


@pytest.mark.parametrize("name", ROWS)
def test_presets_and_the_table_agree(name):
    if name in jsparse.PRESETS:
        preset, expected = jsparse.PRESETS[name], EXPECTED[name]
        fields = (
            "ffn_kind",
            "ffn_threshold",
            "rope_theta",
            "norm_eps",
            "attention_bias",
            "tie_embeddings",
            "embed_scale",
        )
        assert [getattr(preset, field) for field in fields] == [getattr(expected, field) for field in fields]
        assert (preset.sliding_window is None) == (expected.sliding_window is None)


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING, LINEAR_SCALING])
@pytest.mark.parametrize("name", ["SparseLLM/ReluLLaMA-7B", "dense-mistral"])
def test_both_spellings_read_the_same(name, scaling, tmp_path):
    old = ROWS[name] | {"rope_scaling": scaling, "rope_theta": 5e5}
    first = read_config(write_config(tmp_path / "a" / "x", old)).config
    second = read_config(write_config(tmp_path / "b" / "x", new_spelling(old))).config
    assert first == second
    assert first.rope_theta == 5e5
    wanted = {"llama3": RopeScaling("llama3", 8.0, 1.0, 4.0, 16), "linear": RopeScaling("linear", 4.0)}
    assert first.rope_scaling == (wanted[scaling.get("rope_type", "linear")] if scaling else None)


@pytest.mark.parametrize(
    ("row", "changes", "field", "value"),
    [
        ("dense-mistral", {"sliding_window": None}, "sliding_window", None),
        ("dense-mistral", {"sliding_window": ...}, "sliding_window", 4096),
        ("dense-qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "sliding_window", 4),
        ("dense-qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "sliding_window", None),
        ("dense-qwen2", {"tie_word_embeddings": True}, "tie_embeddings", True),
        ("openbmb/MiniCPM-S-1B-sft", {"tie_word_embeddings": False}, "tie_embeddings", False),
        ("dense-llama", {"head_dim": 16}, "head_dim", 16),
        ("dense-llama", {"head_dim": None}, "head_dim", 8),
        ("dense-llama", {"num_key_value_heads": ...}, "num_kv_heads", 4),
        ("dense-llama", {"hidden_act": ...}, "ffn_kind", "swiglu"),
        ("dense-llama", {"rms_norm_eps": ...}, "norm_eps", 1e-6),
        ("dense-llama", {"eos_token_id": [2, 3]}, "eos_token_ids", (2, 3)),
        ("dense-llama", {"eos_token_id": None}, "eos_token_ids", ()),
        ("dense-llama", {"model_type": ...}, "ffn_kind", "swiglu"),
    ],
)
def test_fields_that_vary(row, changes, field, value, tmp_path):
    config = {key: value for key, value in (ROWS[row] | changes).items() if value is not ...}
    assert getattr(read_config(write_config(tmp_path / "model", config)).config, field) == value


def test_generation_config_gives_the_stop_tokens(tmp_path):
    directory = write_config(tmp_path / "model", ROWS["dense-llama"], eos_token_id=[7, 9], bos_token_id=5)
    config = read_config(directory).config
    assert (config.bos_token_id, config.eos_token_ids) == (5, (7, 9))


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        ("SparseQwen2-7B", {}),
        ("sparseqwen2-7b", {}),
        ("mine", {"_name_or_path": "PowerInfer/SparseQwen2-7B"}),
        ("mine", {"_name_or_path": "/data/SparseQwen2-7B/"}),
        ("models--Tiiny--SparseQwen2-7B/snapshots/0123abc", {}),
    ],
)
def test_sparseqwen2_is_recognised(folder, changes, tmp_path):
    reading = read_config(write_config(tmp_path / folder, ROWS["Tiiny/SparseQwen2-7B"] | changes))
    assert reading.config.ffn_kind == "drelu"
    assert reading.config.name == "Tiiny/SparseQwen2-7B"
    assert "recognised as Tiiny/SparseQwen2-7B" in reading.reason
    assert not reading.doubtful


def test_an_unrecognised_qwen2_with_relu_warns(tmp_path, caplog):
    directory = random_checkpoints.write(
        tmp_path / "mine", ROWS["Tiiny/SparseQwen2-7B"], random_checkpoints.random_tensors(ROWS["Tiiny/SparseQwen2-7B"])
    )
    assert from_huggingface(directory).config.ffn_kind == "reglu"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "--ffn drelu" in record.getMessage()
    caplog.clear()
    assert from_huggingface(directory, ffn="drelu").config.ffn_kind == "drelu"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_override_wins_over_everything(tmp_path):
    directory = write_config(tmp_path / "Bamboo-base-v0_1", ROWS["PowerInfer/Bamboo-base-v0_1"])
    assert read_config(directory).config.ffn_kind == "drelu"
    assert read_config(directory, "reglu").config.ffn_kind == "reglu"
    unknown = write_config(tmp_path / "unknown", ROWS["dense-llama"] | {"hidden_act": "gelu"})
    assert read_config(unknown, "reglu").config.ffn_kind == "reglu"


@pytest.mark.parametrize("files", ["safetensors-shards", "bin", "bin-shards"])
def test_every_file_layout_gives_the_same_weights(files, tmp_path):
    name = "Tiiny/TurboSparse-Mistral-Instruct"
    whole = from_huggingface(random_checkpoints.row(tmp_path / "a", name))
    assert_identical(from_huggingface(random_checkpoints.row(tmp_path / "b", name, files=files)).weights, whole.weights)


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtypes_are_kept(stored, files, tmp_path):
    config = ROWS["SparseLLM/ReluLLaMA-7B"]
    tensors = {name: tensor.to(stored) for name, tensor in random_checkpoints.random_tensors(config).items()}
    weights = from_huggingface(random_checkpoints.write(tmp_path / "model", config, tensors, files)).weights
    kept = "float32" if stored == torch.float64 else str(stored).removeprefix("torch.")
    assert weights.embed.dtype == weights.layers[0].ffn.down_t.dtype == kept
    assert weights.norm.dtype == "float32"
    expected = tensors["model.layers.0.mlp.down_proj.weight"].float().numpy().T
    np.testing.assert_array_equal(np.asarray(weights.layers[0].ffn.down_t, np.float32), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_casts_matrices_and_leaves_vectors(dtype, tmp_path):
    name = "Tiiny/SparseQwen2-7B"
    params = from_huggingface(random_checkpoints.row(tmp_path, name), dtype=dtype)
    whole = from_huggingface(tmp_path / "SparseQwen2-7B")
    expected = jax.tree.map(lambda x: x if x.ndim == 1 else x.astype(dtype), whole.weights)
    assert_identical(params.weights, expected)


def test_int8_quantises_the_linear_matrices(tmp_path):
    directory = random_checkpoints.row(tmp_path, "Tiiny/SparseQwen2-7B")
    whole, params = from_huggingface(directory), from_huggingface(directory, dtype="int8")
    ffn = params.weights.layers[1].ffn
    matrices = [ffn.gate, ffn.up, ffn.down_t, params.weights.head]
    matrices += [getattr(params.weights.layers[1].attention, n).rows for n in "qkvo"]
    assert all(isinstance(matrix, Rows) and matrix.storage.bits == 8 for matrix in matrices)
    assert_identical(ffn.down_t, quantize_rows(whole.weights.layers[1].ffn.down_t, Storage("int8")))
    assert_identical(params.weights.embed, whole.weights.embed)
    assert params.weights.layers[1].attention.q.bias.dtype == "float32"


def test_int4_rounds_matrices_in_groups_and_embedding_and_head_in_rows(tmp_path):
    directory = random_checkpoints.row(tmp_path, "Tiiny/SparseQwen2-7B")
    whole, params = from_huggingface(directory), from_huggingface(directory, dtype="int4")
    layer, exact = params.weights.layers[1], whole.weights.layers[1]
    matrices = [layer.ffn.gate, layer.ffn.up, layer.ffn.down_t, *(getattr(layer.attention, n).rows for n in "qkvo")]
    assert {str(matrix.storage) for matrix in matrices} == {"int4:32"}
    assert {str(matrix.storage) for matrix in (params.weights.embed, params.weights.head)} == {"int8"}
    assert_identical(layer.ffn.down_t, cast(exact.ffn.down_t, "int4:32"))
    assert layer.attention.q.bias.dtype == "float32"


@pytest.mark.parametrize("name", ROWS)
def test_round_trip_is_bit_identical(name, tmp_path):
    params = from_huggingface(random_checkpoints.row(tmp_path, name), dtype="bfloat16")
    to_huggingface(params, tmp_path / "out")
    again = from_huggingface(tmp_path / "out")
    assert again.config == params.config
    assert_identical(again.weights, params.weights)


def test_safetensors_library_reads_what_we_write_and_we_read_the_same(tmp_path):
    from safetensors.torch import load_file

    to_huggingface(from_huggingface(random_checkpoints.row(tmp_path, "Tiiny/SparseQwen2-7B")), tmp_path / "out")
    library = load_file(tmp_path / "out" / "model.safetensors")
    tensors = random_checkpoints.random_tensors(ROWS["Tiiny/SparseQwen2-7B"])
    assert library.keys() == tensors.keys()
    ours = read_safetensors(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(library[name].numpy(), tensor.numpy())
        np.testing.assert_array_equal(ours[name].read(), tensor.numpy())


def test_lm_head_of_a_tied_model_is_left_out(tmp_path):
    config = ROWS["SparseLLM/ReluLLaMA-7B"] | {"tie_word_embeddings": True}
    tensors = random_checkpoints.random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert from_huggingface(random_checkpoints.write(tmp_path / "model", config, tensors)).weights.head is None


@pytest.mark.parametrize("files", ["safetensors", "safetensors-shards"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8", pytest.param("int4", marks=pytest.mark.nightly)])
def test_conversion_holds_less_than_one_tensor_besides_the_weights(files, dtype, tmp_path):
    config = ROWS["SparseLLM/ReluLLaMA-7B"] | {"hidden_size": 1024, "intermediate_size": 8192}
    directory = random_checkpoints.write(tmp_path / "model", config, random_checkpoints.random_tensors(config), files)
    stored, reading = open_checkpoint(directory), read_config(directory)
    largest = max(tensor.nbytes for tensor in stored.values())

    convert_mapping.read_weights(stored, reading.config, reading.family, dtype)
    tracemalloc.start()
    weights = convert_mapping.read_weights(stored, reading.config, reading.family, dtype)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(weights.layers[0].ffn, FFNWeights)
    assert peak - held < largest


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_a_terminal_only(terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert_mapping, "_LONG", 0)
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda console: terminal))
    from_huggingface(random_checkpoints.row(tmp_path, "SparseLLM/ReluLLaMA-7B"))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("Converting" in printed.err) == terminal


def test_tokenizer_comes_along(tmp_path):
    import tokenizers

    source = random_checkpoints.row(tmp_path, "SparseLLM/ReluLLaMA-7B")
    words = tokenizers.models.WordLevel({"<unk>": 0, "def": 1, "return": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    params = from_huggingface(source)
    to_huggingface(params, tmp_path / "out")
    again = from_huggingface(tmp_path / "out")
    assert params.tokenizer.encode("return def x") == again.tokenizer.encode("return def x") == [2, 1, 0]


def make_predictors(config: ModelConfig, bits: int | None) -> tuple[Predictor, ...]:
    rng = np.random.default_rng(3)

    def matrix(rows, columns):
        array = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
        return array if bits is None else quantize_rows(array, Storage(f"int{bits}"))

    predictors = []
    for layer in range(config.num_layers):
        bias = rng.standard_normal(config.intermediate_size).astype(np.float32)
        bias[:2] = np.inf, -np.inf
        rank = 5 + layer
        predictors.append(
            Predictor(matrix(rank, config.hidden_size), matrix(config.intermediate_size, rank), jnp.asarray(bias))
        )
    return tuple(predictors)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_powerinfer_files_round_trip(bits, tmp_path):
    predictors = make_predictors(_LLAMA, bits)
    export_predictors(Params(_LLAMA, {}, predictors), tmp_path / "files")
    assert sorted(file.name for file in (tmp_path / "files").iterdir()) == ["model_0.pt", "model_1.pt"]
    state = torch.load(tmp_path / "files" / "model_1.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "fc1.weight": (6, 32),
        "fc2.weight": (48, 6),
        "fc2.bias": (48,),
    }
    again = import_predictors(tmp_path / "files", _LLAMA)
    assert_identical(again, tuple(Predictor(dequantize(p.a), dequantize(p.b), p.bias) for p in predictors))


def test_powerinfer_bfloat16_stays_and_float16_widens(tmp_path):
    predictors = make_predictors(_LLAMA, None)
    for layer, (predictor, dtype) in enumerate(zip(predictors, (torch.bfloat16, torch.float16))):
        arrays = {"fc1.weight": predictor.a, "fc2.weight": predictor.b, "fc2.bias": predictor.bias}
        state = {name: torch.from_numpy(np.array(array)).to(dtype) for name, array in arrays.items()}
        torch.save(state, tmp_path / f"model_{layer}.pt")
    first, second = import_predictors(tmp_path, _LLAMA)
    assert (first.a.dtype, first.b.dtype, first.bias.dtype) == ("bfloat16", "bfloat16", "float32")
    assert (second.a.dtype, second.b.dtype, second.bias.dtype) == ("float32", "float32", "float32")


def test_command_converts_and_says_which_ffn_kind(tmp_path, capsys):
    source = random_checkpoints.row(tmp_path, "Tiiny/SparseQwen2-7B")
    assert exit_code([str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "FFN kind drelu: recognised as Tiiny/SparseQwen2-7B" in capsys.readouterr().out
    loaded, direct = jsparse.load(tmp_path / "out"), from_huggingface(source, dtype="bfloat16")
    assert loaded.config == direct.config
    assert_identical(loaded.weights, direct.weights)

    assert exit_code([str(source), str(tmp_path / "out"), "--ffn", "reglu", "--force"]) == 0
    assert jsparse.load(tmp_path / "out").config.ffn_kind == "reglu"


def test_command_moves_predictors_and_models_both_ways(tmp_path):
    source = random_checkpoints.row(tmp_path, "SparseLLM/ReluLLaMA-7B")
    config = from_huggingface(source).config
    export_predictors(Params(config, {}, make_predictors(config, None)), tmp_path / "files")
    model, files = str(tmp_path / "model"), str(tmp_path / "files")
    assert exit_code([str(source), model, "--import-predictors", files]) == 0
    assert exit_code([model, str(tmp_path / "again"), "--export-predictors"]) == 0
    assert_identical(import_predictors(tmp_path / "again", config), import_predictors(tmp_path / "files", config))
    assert exit_code([model, str(tmp_path / "hf"), "--to-huggingface"]) == 0
    assert_identical(from_huggingface(tmp_path / "hf").weights, jsparse.load(model).weights)


def test_command_runs_as_a_module(tmp_path):
    source = random_checkpoints.row(tmp_path, "dense-llama")
    command = [sys.executable, "-m", "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("FFN kind swiglu: config.json declares llama with silu.")
