"""What public bug reports say of checkpoints: computed as transformers computes it, or refused in a sentence."""

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import run_decoder
from random_checkpoints import ROWS, random_tensors, row, write

import jsparse
from convert import ConversionError, from_huggingface, to_huggingface
from convert.__main__ import main as convert_main
from convert.config import read_config
from convert.config_writer import write_config
from jsparse.executors.npu import Npu
from jsparse.executors.xla import Xla

MISTRAL = ROWS["dense-mistral"] | {"sliding_window": 3}
QWEN2 = ROWS["dense-qwen2"]
LLAMA = ROWS["dense-llama"]
IDS = np.random.default_rng(0).integers(0, 64, (1, 24))


def logits(params: jsparse.Params) -> np.ndarray:
    return np.asarray(run_decoder(params, IDS)[0])


def transformers_logits(directory: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS)).logits.numpy()


def written(tmp_path: Path, config: dict, **options: Any) -> Path:
    return write(tmp_path / "m", config, random_tensors(config), **options)


FULL, SLIDING = "full_attention", "sliding_attention"
UNIFORM = {
    "mistral, all see all": (MISTRAL, {"layer_types": [FULL, FULL], "head_dim": 8}, None),
    "mistral, all slide": (MISTRAL, {"layer_types": [SLIDING, SLIDING], "head_dim": 8}, 3),
    "mistral, not given": (MISTRAL, {}, 3),
    "qwen2, mixed, but without a window": (QWEN2, {"use_sliding_window": True, "sliding_window": None}, None),
    "qwen2, mixed, but switched off": (QWEN2, {"layer_types": [FULL, SLIDING], "use_sliding_window": False}, None),
    "qwen2, all slide": (
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": [SLIDING] * 2, "max_window_layers": 0},
        4,
    ),
    "llama, all see all": (LLAMA, {"layer_types": [FULL, FULL]}, None),
}


@pytest.mark.parametrize("name", UNIFORM)
def test_attention_that_is_the_same_in_all_layers(name, tmp_path):
    base, changes, window = UNIFORM[name]
    directory = written(tmp_path, base | changes)
    params = jsparse.load(directory)
    assert params.config.sliding_window == window
    if window or changes.get("layer_types") == [FULL, FULL]:
        np.testing.assert_allclose(logits(params), transformers_logits(directory), atol=2e-5)


SLIDES = {"use_sliding_window": True, "sliding_window": 4}
MIXED = {
    "mistral": (MISTRAL, {"layer_types": [SLIDING, FULL], "head_dim": 8}, (True, False)),
    "qwen2 by layer types": (QWEN2, SLIDES | {"layer_types": [FULL, SLIDING]}, (False, True)),
    "qwen2 by the first layer": (QWEN2, SLIDES | {"max_window_layers": 1}, (False, True)),
}


@pytest.mark.parametrize("name", MIXED)
def test_attention_that_differs_by_layer(name, tmp_path):
    base, changes, slides = MIXED[name]
    directory = written(tmp_path, base | changes)
    params = jsparse.load(directory)
    assert params.config.slides == slides
    to_huggingface(params, tmp_path / "exported")
    for path in (directory, tmp_path / "exported"):
        if base is MISTRAL:  # transformers has layers that differ in a class of their own
            config = json.loads((path / "config.json").read_text())
            renamed = {"model_type": "ministral", "architectures": ["MinistralForCausalLM"]}
            (path / "config.json").write_text(json.dumps(config | renamed))
        np.testing.assert_allclose(logits(params), transformers_logits(path), atol=2e-5)
    said = [jsparse.generate(params, IDS[0], max_new_tokens=20, executor=name).tolist() for name in ("auto", "xla")]
    assert said[0] == said[1]
    uniform = dataclasses.replace(params, config=dataclasses.replace(params.config, slides=None))
    assert np.abs(logits(uniform) - logits(params)).max() > 1e-2
    on_device = Npu(Xla(), "cpu")
    with pytest.raises(
        jsparse.JsparseError, match="'cann' cannot run this model: its layers differ in their attention"
    ):
        jsparse.generate(params, IDS[0], max_new_tokens=2, executor=on_device)


def test_biases_on_all_attention_projections(tmp_path):
    config = LLAMA | {"attention_bias": True}
    tensors = random_tensors(config)
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if "self_attn" in name]:
        tensors[name.replace("weight", "bias")] = torch.randn(len(tensors[name]), generator=generator)
    directory = write(tmp_path / "m", config, tensors)
    params = jsparse.load(directory)
    assert params.config.attention_bias == "all"
    np.testing.assert_allclose(logits(params), transformers_logits(directory), atol=2e-5)
    to_huggingface(params, tmp_path / "exported")
    np.testing.assert_allclose(logits(params), transformers_logits(tmp_path / "exported"), atol=2e-5)
    with pytest.raises(jsparse.JsparseError, match="'cann' cannot run this model: its attention has a bias"):
        jsparse.generate(params, IDS[0], max_new_tokens=2, executor=Npu(Xla(), "cpu"))


REFUSED = {
    "llama": (LLAMA, {"layer_types": [FULL, SLIDING], "sliding_window": 3}, "sliding window"),
    "llama, all slide": (LLAMA, {"layer_types": [SLIDING] * 2, "sliding_window": 3}, "sliding window"),
    "another kind": (MISTRAL, {"layer_types": ["chunked_attention", FULL]}, "chunked_attention"),
    "too few layers": (MISTRAL, {"layer_types": [SLIDING]}, "for each layer"),
    "no list": (MISTRAL, {"layer_types": "sliding_attention"}, "for each layer"),
    "layers in lists": (MISTRAL, {"layer_types": [[SLIDING], FULL]}, "for each layer"),
    "Ministral's own spelling": (MISTRAL, {"interleaved_sliding_window": 3}, "interleaved_sliding_window"),
    "a pattern": (MISTRAL, {"sliding_window_pattern": 2}, "sliding_window_pattern"),
    "layers without rotation": (LLAMA, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_of_another_kind_is_refused(name, tmp_path):
    base, changes, said = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(base | changes))
    with pytest.raises(ConversionError, match=said):
        read_config(tmp_path)


CONTEXTS = {
    "vicuna-7b-v1.5-16k": (4096, {"type": "linear", "factor": 4.0}, 16384),
    "longchat-7b-v1.5-32k": (4096, {"type": "linear", "factor": 8.0}, 32768),
    "whole factor": (4096, {"rope_type": "linear", "factor": 2}, 8192),
    "extended already": (8192, {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 4096}, 8192),
    "shrinking": (100, {"type": "linear", "factor": 0.5}, 100),
    "odd": (101, {"type": "linear", "factor": 1.5}, 152),
    "llama3": (
        131072,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        131072,
    ),
    "none": (4096, None, 4096),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_the_context_that_a_scaled_checkpoint_has(name, tmp_path):
    length, scaling, context = CONTEXTS[name]
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"max_position_embeddings": length, "rope_scaling": scaling})
    )
    config = read_config(tmp_path).config
    assert config.context_length == context
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, "float32")))
    again = read_config(tmp_path).config
    assert (again.context_length, again.rope_scaling) == (context, config.rope_scaling)


def test_prompts_and_answers_beyond_the_unextended_length(tmp_path):
    config = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 32}
    directory = written(tmp_path, config | {"eos_token_id": None})
    prompt = IDS[0].tolist() * 2
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    right = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
    got = jsparse.generate(jsparse.load(directory), prompt, max_new_tokens=20)
    assert got.tolist() == right[0, len(prompt) :].tolist()


def test_names_without_the_prefix(tmp_path):
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = random_tensors(tied)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    directory = write(tmp_path / "bare", tied, bare)
    np.testing.assert_array_equal(
        logits(jsparse.load(directory)), logits(jsparse.load(write(tmp_path / "full", tied, tensors)))
    )
    np.testing.assert_allclose(logits(jsparse.load(directory)), transformers_logits(directory), atol=2e-5)
    with pytest.raises(ConversionError, match=r"missing: lm_head\.weight"):
        jsparse.load(write(tmp_path / "untied", LLAMA, bare))
    doubled = tensors | {"norm.weight": tensors["model.norm.weight"].clone()}
    with pytest.raises(ConversionError, match=r"with and without the prefix 'model\.': norm\.weight"):
        jsparse.load(write(tmp_path / "doubled", tied, doubled))


def test_a_head_that_is_not_the_tied_embedding(tmp_path, caplog):
    tied = LLAMA | {"tie_word_embeddings": True}
    tensors = random_tensors(LLAMA)
    directory = write(tmp_path / "m", tied, tensors)
    with caplog.at_level(logging.WARNING, logger="convert"):
        params = jsparse.load(directory)
    assert "lm_head.weight differs from the embedding" in caplog.text
    assert not params.config.tie_embeddings
    np.testing.assert_allclose(logits(params), transformers_logits(directory), atol=2e-5)
    caplog.clear()
    for number, head in enumerate((torch.randn(66, 32), torch.tensor(1.0), torch.randn(64, 32).to(torch.float8_e5m2))):
        with pytest.raises(ConversionError, match=r"lm_head\.weight is"):
            jsparse.load(write(tmp_path / f"bad{number}", tied, tensors | {"lm_head.weight": head}))
    caplog.clear()
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert jsparse.load(write(tmp_path / "same", tied, same)).config.tie_embeddings
    assert "lm_head" not in caplog.text


def strange(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    return {
        "sparse": tensor.to_sparse,
        "sparse csr": tensor.to_sparse_csr,
        "qint8": lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "meta": lambda: tensor.to("meta"),
    }[kind]()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "sparse csr", "qint8", "meta"])
def test_tensors_that_are_no_arrays(kind, tmp_path):
    tensors = random_tensors(LLAMA)
    name = "model.layers.0.mlp.up_proj.weight"
    directory = write(tmp_path / "m", LLAMA, tensors | {name: strange(tensors[name], kind)}, files="bin")
    with pytest.raises(ConversionError, match=rf"pytorch_model\.bin .*{name}") as caught:
        jsparse.load(directory)
    assert "\n" not in str(caught.value)


def test_what_torch_refuses_is_said_without_advice_to_run_it(tmp_path):
    directory = write(tmp_path / "m", LLAMA, random_tensors(LLAMA), files="bin")
    torch.save({"a": torch.zeros(1), "b": Path("x")}, directory / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"it holds pathlib\.") as caught:
        jsparse.load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ConversionError) as damaged:
        jsparse.load(directory)
    for said in (str(caught.value), str(damaged.value)):
        assert "weights_only" not in said
        assert "arbitrary code" not in said


def test_adapters(tmp_path, caplog):
    directory = written(tmp_path, LLAMA)
    (directory / "adapter_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING, logger="convert"):
        jsparse.load(directory)
    assert "the adapter beside the weights is left out" in caplog.text
    (directory / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"is an adapter, not a model: merge it"):
        jsparse.load(directory)


def test_what_is_left_out_of_turbosparse_is_said(tmp_path, capsys):
    directory = row(tmp_path, "Tiiny/TurboSparse-Mistral-Instruct")
    convert_main([str(directory), str(tmp_path / "o")])
    assert "own predictors are left out, and with them the mask" in capsys.readouterr().out
    convert_main([str(row(tmp_path, "PowerInfer/Bamboo-base-v0_1")), str(tmp_path / "p")])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ids", "kept"), [((-1, 999), (None, ())), ((1, [2, 64, -1]), (1, (2,))), ((None, None), (None, ()))]
)
def test_token_ids_outside_the_vocabulary_are_none(ids, kept, tmp_path):
    bos, eos = ids
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"bos_token_id": bos, "eos_token_id": eos}))
    config = read_config(tmp_path).config
    assert (config.bos_token_id, config.eos_token_ids) == kept


def test_a_config_behind_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())
    assert read_config(tmp_path).config.num_layers == 2


SPARSEQWEN2 = ROWS["Tiiny/SparseQwen2-7B"]


@pytest.mark.parametrize(
    "place",
    [
        "SparseQwen2-7B",
        "Tiiny_SparseQwen2-7B",
        "tiiny__sparseqwen2-7b",
        "models--Tiiny--SparseQwen2-7B/snapshots/0123abc",
        "link to a snapshot",
        "link in a folder of links",
        "relative",
    ],
)
def test_a_checkpoint_is_recognised_wherever_it_lies(place, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--Tiiny--SparseQwen2-7B" / "snapshots" / "0123abc"
    if place == "link to a snapshot":
        write(snapshot, SPARSEQWEN2, random_tensors(SPARSEQWEN2))
        (tmp_path / "mymodel").symlink_to(snapshot)
        directory = tmp_path / "mymodel"
    elif place == "link in a folder of links":
        write(snapshot, SPARSEQWEN2, random_tensors(SPARSEQWEN2))
        directory = tmp_path / "links"
        directory.mkdir()
        for path in snapshot.iterdir():
            (directory / path.name).symlink_to(path)
    elif place == "relative":
        write(tmp_path / "SparseQwen2-7B", SPARSEQWEN2, random_tensors(SPARSEQWEN2))
        monkeypatch.chdir(tmp_path / "SparseQwen2-7B")
        directory = Path(".")
    else:
        directory = write(tmp_path / place, SPARSEQWEN2, random_tensors(SPARSEQWEN2))
    assert from_huggingface(directory).config.ffn_kind == "drelu"


@pytest.mark.parametrize("folder", ["my-relu-qwen", "finetunes/mine"])
def test_what_lies_beside_a_cache_is_not_the_cached_checkpoint(folder, tmp_path):
    directory = tmp_path / "models--Tiiny--SparseQwen2-7B" / folder
    assert from_huggingface(write(directory, SPARSEQWEN2, random_tensors(SPARSEQWEN2))).config.ffn_kind == "reglu"


def test_the_name_inside_a_config_comes_before_its_folder(tmp_path):
    config = ROWS["SparseLLM/prosparse-llama-2-7b"] | {"_name_or_path": "openbmb/MiniCPM-S-1B-sft"}
    del config["hidden_act_param"]
    (tmp_path / "prosparse-llama-2-7b").mkdir()
    (tmp_path / "prosparse-llama-2-7b" / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "prosparse-llama-2-7b").config.ffn_threshold == 0.03


def test_another_name_that_ends_alike_is_not_recognised(tmp_path):
    directory = write(tmp_path / "notSparseQwen2-7B", SPARSEQWEN2, random_tensors(SPARSEQWEN2))
    assert from_huggingface(directory).config.ffn_kind == "reglu"


@pytest.mark.parametrize("key", [0, None, ("a", "b")])
def test_tensors_under_names_that_are_no_strings(key, tmp_path):
    directory = write(tmp_path / "m", LLAMA, random_tensors(LLAMA), files="bin")
    torch.save({key: torch.zeros(1)}, directory / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="names tensors by things that are no strings"):
        jsparse.load(directory)


def test_tensors_that_are_views_with_a_sign(tmp_path):
    tensors = random_tensors(LLAMA)
    name = "model.layers.0.mlp.up_proj.weight"
    negated = torch.complex(torch.zeros_like(tensors[name]), -tensors[name]).conj().imag
    assert negated.is_neg()
    directory = write(tmp_path / "m", LLAMA, tensors | {name: negated}, files="bin")
    plain = write(tmp_path / "p", LLAMA, tensors, files="bin")
    np.testing.assert_array_equal(logits(jsparse.load(directory)), logits(jsparse.load(plain)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 10**400}, "rope_theta is"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is"),
        ({"max_position_embeddings": 2**31}, "context_length is"),
        ({"rope_scaling": {"type": "linear", "factor": 1e30}}, "context_length is"),
    ],
)
def test_numbers_that_are_too_large(changes, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ConversionError, match=said):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_never_ends(name, tmp_path):
    directory = written(tmp_path, LLAMA)
    (directory / "tokenizer.json").write_text("{}")
    (directory / name).write_text('{"a": ' * 100_000)
    with pytest.raises(jsparse.JsparseError, match=f"{name} is not valid JSON"):
        jsparse.load(directory)


def test_stop_tokens_behind_a_dangling_link(tmp_path):
    directory = written(tmp_path, LLAMA)
    (directory / "generation_config.json").symlink_to("nowhere")
    with pytest.raises(ConversionError, match=r"generation_config\.json cannot be read"):
        jsparse.load(directory)


def test_shards_with_names_that_no_file_can_have(tmp_path):
    directory = written(tmp_path, LLAMA, files="safetensors-shards")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(ConversionError, match="names shards that do not exist"):
        jsparse.load(directory)


@pytest.mark.parametrize("option", ["--to-huggingface", "--export-predictors"])
def test_a_full_disk_is_a_sentence(option, tmp_path, tiny_fitted):
    jsparse.save(tiny_fitted, tmp_path / "m")
    command = f"ulimit -f 1; exec {sys.executable} -m convert {tmp_path / 'm'} {tmp_path / 'o'} {option}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_paths_of_the_home_directory_in_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    jsparse.save(jsparse.load(written(tmp_path, LLAMA)), own)
    with pytest.raises(SystemExit) as caught:
        convert_main([str(own), "~/own", "--force"])
    assert caught.value.code == 2
    convert_main(["~/own", "~/o", "--to-huggingface"])
    assert (tmp_path / "o" / "config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_int8_becomes_float32_with_a_word(tmp_path, capsys):
    directory = written(tmp_path, LLAMA)
    convert_main([str(directory), str(tmp_path / "o"), "--to-huggingface", "--dtype", "int8"])
    assert "int8 and int4 matrices are written as float32" in capsys.readouterr().out
    convert_main([str(directory), str(tmp_path / "p"), "--to-huggingface"])
    assert "int8 matrices" not in capsys.readouterr().out


def test_an_export_that_cannot_be_read_back_is_no_success(tmp_path, monkeypatch):
    from convert import huggingface

    params = jsparse.load(written(tmp_path, LLAMA))
    right = huggingface.save_file

    def lose(arrays, path, metadata):
        right({name: array * (name != "model.norm.weight") for name, array in arrays.items()}, path, metadata)

    monkeypatch.setattr(huggingface, "save_file", lose)
    with pytest.raises(ConversionError, match=r"cannot be read back: model\.norm\.weight"):
        to_huggingface(params, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_exports_carry_the_format_that_old_versions_want(tmp_path):
    import safetensors

    params = jsparse.load(written(tmp_path, LLAMA))
    to_huggingface(dataclasses.replace(params, tokenizer=None), tmp_path / "o")
    with safetensors.safe_open(tmp_path / "o" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
