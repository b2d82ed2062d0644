"""Whatever is wrong with a checkpoint is said in one sentence, and nothing half-written stays behind."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
import random_checkpoints
import torch
from conftest import random_params
from convert_command import exit_code
from random_checkpoints import ROWS

import jsparse
from convert import ConversionError, export_predictors, from_huggingface, import_predictors, to_huggingface
from jsparse.model.config import ModelConfig
from jsparse.model.weights import Params, Predictor

LLAMA = ROWS["SparseLLM/ReluLLaMA-7B"]
Q = "model.layers.0.self_attn.q_proj.weight"


def model(directory: Path, files: str = "safetensors", config: dict = LLAMA, **tensors) -> Path:
    """A Llama checkpoint with some tensors replaced, added, or taken out (None)."""
    replaced = {name.replace("__", "."): value for name, value in tensors.items()}
    content = random_checkpoints.random_tensors(config) | replaced
    return random_checkpoints.write(
        directory, config, {name: value for name, value in content.items() if value is not None}, files
    )


def with_config(**changes) -> Callable[[Path], Path]:
    """A checkpoint whose config.json differs; `...` removes a key."""

    def build(directory: Path) -> Path:
        config = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
        random_checkpoints.write(directory, LLAMA, random_checkpoints.random_tensors(LLAMA))
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return build


def with_tensors(files: str = "safetensors", config: dict = LLAMA, **tensors) -> Callable[[Path], Path]:
    return lambda directory: model(directory, files, config, **tensors)


def with_damage(damage: Callable[[Path], object], files: str = "safetensors") -> Callable[[Path], Path]:
    def build(directory: Path) -> Path:
        model(directory, files)
        damage(directory)
        return directory

    return build


def poisoned(value: float) -> torch.Tensor:
    tensor = torch.ones(32, 32)
    tensor[31, 5] = value
    return tensor


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return damage


def duplicate_shard(directory: Path) -> None:
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "model-00002-of-00003.safetensors")


def overwrite_header(text: bytes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)

    return damage


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("should_not_exist",))


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "no directory": (lambda directory: directory, ["no such file"]),
    "no config": (with_damage(lambda d: (d / "config.json").unlink()), ["config.json does not exist"]),
    "config is no JSON": (
        with_damage(lambda d: (d / "config.json").write_text("{")),
        ["config.json is not valid JSON"],
    ),
    "config is a list": (with_damage(lambda d: (d / "config.json").write_text("[]")), ["holds a JSON list"]),
    "unknown architecture": (with_config(model_type="gpt2"), ["unknown architecture 'gpt2'", "llama", "minicpm"]),
    "no architecture": (with_config(model_type=..., architectures=...), ["unknown architecture ''"]),
    "an FFN kind that is a list": (with_config(ffn_kind=["reglu"]), ["ffn_kind is ['reglu'] and must be one of"]),
    "unknown activation": (with_config(hidden_act="gelu"), ["unknown activation hidden_act 'gelu'", "--ffn"]),
    "missing keys": (
        with_config(hidden_size=..., vocab_size=..., num_hidden_layers=...),
        ["config.json", "missing", "hidden_size", "vocab_size", "num_hidden_layers"],
    ),
    "missing threshold": (with_config(hidden_act="fatrelu"), ["missing hidden_act_param"]),
    "missing MiniCPM scales": (
        with_config(model_type="minicpm"),
        ["missing", "scale_emb", "scale_depth", "dim_model_base"],
    ),
    "wrong types": (
        with_config(hidden_size="wide", rms_norm_eps=[1], eos_token_id="x", rope_scaling=3),
        ["hidden_size is 'wide', not an integer", "rms_norm_eps is [1]", "eos_token_id is 'x'", "rope_scaling is 3"],
    ),
    "two scalings": (
        with_config(
            rope_scaling={"type": "linear", "factor": 4.0},
            rope_parameters={"rope_type": "default", "factor": 2.0, "rope_theta": 1e4},
        ),
        [
            "rope_parameters has factor 2.0, rope_scaling 4.0: delete the one that is wrong",
            "rope_parameters has rope_type 'default', rope_scaling 'linear'",
        ],
    ),
    "llama3 scaling of nothing": (
        with_config(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": -4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 0,
            }
        ),
        ["low_freq_factor must lie between 0", "original_max_position_embeddings must be at least 1"],
    ),
    "flags in words": (
        with_config(attention_bias="false", tie_word_embeddings="no"),
        ["attention_bias is 'false', neither true nor false", "tie_word_embeddings is 'no', neither true nor false"],
    ),
    "a window in words": (
        with_config(model_type="qwen2", use_sliding_window="false"),
        ["use_sliding_window is 'false', neither true nor false"],
    ),
    "impossible sizes": (with_config(num_key_value_heads=3), ["num_heads 4 is not a multiple of num_kv_heads 3"]),
    "indivisible heads": (with_config(num_attention_heads=5), ["hidden_size 32 is not a multiple of"]),
    "attention bias": (with_config(model_type="mistral", attention_bias=True), ["attention_bias is set"]),
    "attention bias without its tensors": (with_config(attention_bias=True), ["missing", "self_attn.o_proj.bias"]),
    "ffn bias": (with_config(mlp_bias=True), ["mlp_bias is set"]),
    "quantised": (with_config(quantization_config={"bits": 4}), ["quantization_config", "unquantised"]),
    "partial rotary": (with_config(partial_rotary_factor=0.5), ["partial_rotary_factor is 0.5"]),
    "yarn": (with_config(rope_scaling={"rope_type": "yarn", "factor": 2}), ["rope scaling 'yarn'", "llama3"]),
    "dynamic, older spelling": (with_config(rope_scaling={"type": "dynamic"}), ["rope scaling 'dynamic'"]),
    "llama3 incomplete": (
        with_config(rope_scaling={"rope_type": "llama3"}),
        ["missing factor, low_freq_factor, high_freq_factor"],
    ),
    "rope by layer type": (
        with_config(rope_parameters={"full_attention": {"rope_theta": 1}}),
        ["differ by layer type", "full_attention"],
    ),
    "windows on some layers": (
        with_config(model_type="qwen2", use_sliding_window=True, max_window_layers=1, num_hidden_layers=10**9),
        ["num_hidden_layers is 1000000000"],
    ),
    "no weights": (with_damage(lambda d: (d / "model.safetensors").unlink()), ["no weights", "pytorch_model.bin"]),
    "truncated": (
        with_damage(lambda d: os.truncate(d / "model.safetensors", 9000)),
        ["model.safetensors is truncated"],
    ),
    "truncated in the header": (
        with_damage(lambda d: os.truncate(d / "model.safetensors", 100)),
        ["model.safetensors is truncated"],
    ),
    "empty": (with_damage(lambda d: os.truncate(d / "model.safetensors", 0)), ["model.safetensors is truncated"]),
    "corrupt header": (with_damage(overwrite_header(b"{nonsense")), ["model.safetensors", "corrupt"]),
    "header is a list": (with_damage(overwrite_header(b"[1]")), ["model.safetensors", "corrupt"]),
    "header of unknown dtype": (with_damage(overwrite_header(entry("F3"))), ["model.safetensors", "corrupt", "F3"]),
    "header of wrong size": (with_damage(overwrite_header(entry(offsets=(0, 12)))), ["model.safetensors", "corrupt"]),
    "header with a name twice": (
        with_damage(overwrite_header(b'{"x":' + entry()[5:-1] + b',"x":' + entry()[5:-1] + b"}")),
        ["model.safetensors", "corrupt"],
    ),
    "unreadable": (
        with_damage(lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir())),
        ["model.safetensors cannot be read"],
    ),
    "missing shard": (
        with_damage(lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "safetensors-shards"),
        ["model-00002-of-00003.safetensors", "do not exist"],
    ),
    "index without map": (
        with_damage(edit_index(lambda index: index.pop("weight_map")), "safetensors-shards"),
        ["index.json has no weight_map"],
    ),
    "index names absent tensors": (
        with_damage(
            edit_index(lambda index: index["weight_map"].update(ghost="model-00001-of-00003.safetensors")),
            "safetensors-shards",
        ),
        ["index.json", "not in their shards", "ghost"],
    ),
    "index points outside": (
        with_damage(edit_index(lambda index: index["weight_map"].update(x="../x")), "safetensors-shards"),
        ["outside its own directory", "../x"],
    ),
    "tensor in two shards": (
        with_damage(duplicate_shard, "safetensors-shards"),
        ["found in two shards", "model-00001-of-00003.safetensors and model-00002-of-00003.safetensors"],
    ),
    "corrupt bin": (with_damage(lambda d: os.truncate(d / "pytorch_model.bin", 500), "bin"), ["pytorch_model.bin"]),
    "bin with an object that runs code": (
        with_damage(lambda d: torch.save({"x": Malicious()}, d / "pytorch_model.bin"), "bin"),
        ["pytorch_model.bin is no PyTorch file of tensors alone"],
    ),
    "bin with a list": (
        with_damage(lambda d: torch.save([1], d / "pytorch_model.bin"), "bin"),
        ["holds a list, not a dictionary"],
    ),
    "bin with numbers": (
        with_damage(lambda d: torch.save({"step": 3}, d / "pytorch_model.bin"), "bin"),
        ["not tensors: step"],
    ),
    "tensors that do not fit": (
        with_tensors(
            **{Q: None, "model.norm.weight": None, "score.weight": torch.ones(2), "lm_head.weight": torch.ones(3, 3)},
            **{"model.embed_tokens.weight": torch.ones(64, 32, dtype=torch.int8)},
        ),
        [
            f"2 missing: {Q}, model.norm.weight",
            "1 unknown: score.weight",
            "1 wrongly shaped: lm_head.weight is (3, 3), expected (64, 32)",
            "1 not floating point: model.embed_tokens.weight is int8",
        ],
    ),
    "down_proj the other way round": (
        with_tensors(**{"model.layers.1.mlp.down_proj.weight": torch.ones(48, 32)}),
        ["model.layers.1.mlp.down_proj.weight is (48, 32), expected (32, 48)"],
    ),
    "biases that llama has not": (
        with_tensors(**{Q.replace("weight", "bias"): torch.ones(32)}),
        ["1 unknown: model.layers.0.self_attn.q_proj.bias"],
    ),
    "NaN": (with_tensors(**{Q: poisoned(float("nan"))}), [f"{Q} holds NaN or infinity"]),
    "infinity": (with_tensors(**{Q: poisoned(float("-inf"))}), [f"{Q} holds NaN or infinity"]),
    "bad tokenizer": (
        with_damage(lambda d: (d / "tokenizer.json").write_text("{}")),
        ["tokenizer.json"],
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints_are_refused_with_the_reason(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build, expected = CHECKPOINTS[name]
    source = build(tmp_path / "source")
    with pytest.raises(jsparse.JsparseError) as caught:
        jsparse.load(source)
    assert exit_code([str(source), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    for part in expected:
        assert part in str(caught.value)
        assert part in printed
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_long_lists_are_cut_with_their_number(tmp_path):
    extra = {f"extra.{i}": torch.ones(1) for i in range(30)}
    with pytest.raises(ConversionError, match=r"30 unknown: .* and 22 more"):
        from_huggingface(model(tmp_path / "source", **extra))


def test_float16_that_overflows_is_refused(tmp_path):
    source = model(tmp_path / "source", **{Q: poisoned(1e6)})
    from_huggingface(source, dtype="bfloat16")
    with pytest.raises(ConversionError, match=f"{Q} does not fit in float16"):
        from_huggingface(source, dtype="float16")


@pytest.mark.parametrize("options", [{"ffn": "relu"}, {"ffn": ["reglu"]}, {"dtype": "int3"}, {"dtype": ["int8"]}])
def test_unknown_options_are_refused(options, tmp_path):
    with pytest.raises(ConversionError, match="must be one of"):
        from_huggingface(model(tmp_path / "source"), **options)


def test_without_torch_a_bin_says_what_to_install(tmp_path, monkeypatch):
    source = model(tmp_path / "source", "bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin .* pip install torch"):
        from_huggingface(source)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    source = with_config(auto_map={"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"})(tmp_path / "a")
    (source / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    from_huggingface(source)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "SRC"),
        (["source"], "DST"),
        (["source", "out", "--ffn", "gelu"], "--ffn"),
        (["source", "out", "--dtype", "int3"], "--dtype"),
        (["source", "full"], "full exists"),
        (["source", "full", "--force"], "something else than a jsparse model"),
        (["source", "full", "--to-huggingface"], "full already exists"),
        (["source", "full", "--to-huggingface", "--force"], "--force"),
        (["source", "out", "--to-huggingface", "--export-predictors"], "not allowed with"),
        (["source", "out", "--export-predictors"], "no predictors"),
        (["source", "out", "--import-predictors", "nowhere"], "nowhere is not a directory"),
        (["source", "out", "--import-predictors", "full"], "missing model_0.pt, model_1.pt"),
        (["source", "source"], "must not lie in each other"),
        (["source", "source/out"], "must not lie in each other"),
        (["source", "source/config.json/out"], "must not lie in each other"),
        (["source", "file/out"], "file is not a directory"),
    ],
)
def test_wrong_commands(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code = exit_code(arguments)
    printed = capsys.readouterr().err
    assert code == 2
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert expected in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mode", [[], ["--to-huggingface"]])
def test_interruption_leaves_nothing(mode, tmp_path, capsys, monkeypatch):
    source = model(tmp_path / "source")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("jsparse.checkpoints.native._save_arrays", interrupt)
    monkeypatch.setattr("convert.huggingface.save_file", interrupt)
    assert exit_code([str(source), str(tmp_path / "out"), *mode]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    source = model(tmp_path / "source")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.huggingface.save_file", full)
    assert exit_code([str(source), str(tmp_path / "out"), "--to-huggingface"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CONFIG = ModelConfig(32, 48, 2, 4, 2, 64)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"attention_bias": "qkv", "embed_scale": 12.0}, "MiniCPM scales"),
        ({"sliding_window": 6, "logit_scale": 0.5}, "MiniCPM scales"),
        ({"ffn_kind": "relu2"}, "an FFN without up_proj"),
    ],
)
def test_what_no_architecture_has_is_not_exported(changes, missing, tmp_path):
    params = random_params(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(ConversionError, match=f"no Hugging Face architecture has {missing}"):
        to_huggingface(params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def predictor_files(directory: Path, layers: int = 2, **changes) -> Path:
    """PowerInfer files of rank 5 for `CONFIG`, with tensors of layer 1 replaced, added, or taken out (None)."""
    directory.mkdir()
    for layer in range(layers):
        state = {"fc1.weight": torch.ones(5, 32), "fc2.weight": torch.ones(48, 5), "fc2.bias": torch.zeros(48)}
        state |= changes if layer == 1 else {}
        torch.save({name: v for name, v in state.items() if v is not None}, directory / f"model_{layer}.pt")
    return directory


PREDICTORS: dict[str, tuple[dict, list[str]]] = {
    "no files": ({"layers": 0}, ["missing model_0.pt, model_1.pt"]),
    "missing layer": ({"layers": 1}, ["missing model_1.pt"]),
    "too many layers": ({"layers": 3}, ["the model has 2 layers", "model_2.pt"]),
    "trained for PowerInfer": ({"fc2.bias": None}, ["model_1.pt", "no fc2.bias", "ReLU between"]),
    "missing matrix": ({"fc1.weight": None}, ["model_1.pt: fc1.weight is missing"]),
    "unknown tensor": ({"fc3.weight": torch.ones(1)}, ["model_1.pt: fc3.weight is unknown"]),
    "another model's": (
        {"fc1.weight": torch.ones(5, 40), "fc2.weight": torch.ones(50, 5), "fc2.bias": torch.ones(50)},
        ["fc1.weight is (5, 40), expected (5, 32)", "fc2.weight is (50, 5), expected (48, 5)", "expected (48,)"],
    ),
    "ranks disagree": ({"fc2.weight": torch.ones(48, 6)}, ["fc2.weight is (48, 6), expected (48, 5)"]),
    "integers": ({"fc1.weight": torch.ones(5, 32, dtype=torch.int8)}, ["fc1.weight is int8"]),
    "NaN": ({"fc2.bias": torch.full((48,), torch.nan)}, ["model_1.pt: fc2.bias holds NaN"]),
    "infinity": ({"fc2.weight": torch.full((48, 5), torch.inf)}, ["model_1.pt: fc2.weight holds NaN or infinity"]),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_bad_predictor_files_are_refused(name, tmp_path):
    changes, expected = PREDICTORS[name]
    with pytest.raises(ConversionError) as caught:
        import_predictors(predictor_files(tmp_path / "files", **changes), CONFIG)
    for part in expected:
        assert part in str(caught.value)


def test_good_predictor_files_are_accepted(tmp_path):
    predictors = import_predictors(predictor_files(tmp_path / "files"), CONFIG)
    assert [predictor.rank for predictor in predictors] == [5, 5]


def test_corrupt_predictor_file_is_named(tmp_path):
    files = predictor_files(tmp_path / "files")
    (files / "model_1.pt").write_bytes(b"nonsense")
    with pytest.raises(ConversionError, match=r"model_1\.pt"):
        import_predictors(files, CONFIG)


def test_dense_models_take_no_predictors(tmp_path):
    with pytest.raises(ConversionError, match="swiglu"):
        import_predictors(predictor_files(tmp_path / "files"), dataclasses.replace(CONFIG, ffn_kind="swiglu"))


def test_predictors_are_not_exported_over_something_else(tmp_path):
    predictor = Predictor(jnp.ones((5, 32)), jnp.ones((48, 5)), jnp.zeros(48))
    (tmp_path / "files").mkdir()
    with pytest.raises(ConversionError, match="already exists"):
        export_predictors(Params(CONFIG, {}, (predictor, predictor)), tmp_path / "files")
    with pytest.raises(ConversionError, match="no predictors"):
        export_predictors(Params(CONFIG, {}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
