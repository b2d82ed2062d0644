"""What public bug reports say of generation: numbers that overflow, options of the wrong type, answers cut short."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, random_params
from random_checkpoints import ROWS, random_tensors, write
from safetensors.numpy import load_file, save_file
from tokenizer_files import LLAMA, byte_fallback, byte_level, byte_tokenizer, write_scripted, write_tokenizer

import convert
import jsparse
from jsparse.decoding import loop
from jsparse.decoding.loop import Decoding
from jsparse.decoding.sampling import Sampling
from jsparse.executors.select import select_executor
from jsparse.predictors.texts import read_prompts

CONFIG = ROWS["SparseLLM/ReluLLaMA-7B"] | {"eos_token_id": None, "torch_dtype": "float16"}
PROMPT = [5, 9, 33, 7]


def float16_checkpoint(tmp_path, scale: float, part: str = "v"):
    """A float16 checkpoint whose keys or values are `scale` times as large, which changes nothing of its answers."""
    tensors = random_tensors(CONFIG)
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn."
        tensors[f"{attention}{part}_proj.weight"] *= scale
        tensors[f"{attention}{'o' if part == 'v' else 'q'}_proj.weight"] /= scale
    return write(tmp_path / "m", CONFIG, {name: tensor.half() for name, tensor in tensors.items()})


def transformers_ids(directory, count: int) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **options)[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("executor", ["auto", "xla"])
@pytest.mark.parametrize("part", ["k", "v"])
def test_keys_and_values_beyond_float16(part, executor, tmp_path):
    directory = float16_checkpoint(tmp_path, 15000, part)
    params = jsparse.load(directory)
    right = transformers_ids(directory, 12)
    assert len(set(right)) > 3
    assert jsparse.generate(params, PROMPT, max_new_tokens=12, executor=executor).tolist() == right
    both = jsparse.generate(params, [PROMPT, PROMPT[:2]], max_new_tokens=12, executor=executor)
    assert both[0].tolist() == right


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, "float16"), (15000.0, "float32")])
def test_the_cache_keeps_16_bits_where_they_hold_what_is_computed(scale, dtype, tmp_path):
    params = jsparse.load(float16_checkpoint(tmp_path, scale))
    sampling = Sampling.create(params.config.vocab_size)
    options = {"sampling": sampling, "max_new_tokens": 4, "seed": 0, "sparse": False}
    decoding = Decoding(params, [PROMPT], executor=select_executor("xla"), **options)
    assert {str(side.dtype) for side in jax.tree.leaves(decoding._loop._caches)} == {dtype}


def overflowing(layer: int, at: int) -> jsparse.Params:
    """A model whose float32 overflows in a layer's FFN where token 7 is read: its embedding is enormous there."""
    params = random_params(dataclasses.replace(TINY, num_layers=3))
    ffn = params.weights.layers[layer].ffn
    big = jnp.where(jnp.arange(ffn.down_t.shape[0])[:, None] % 2 == 0, 3e38, -3e38)
    ffn = dataclasses.replace(ffn, down_t=jnp.broadcast_to(big, ffn.down_t.shape))
    return dataclasses.replace(params, weights=params.weights.replace_layer(layer, ffn=ffn))


@pytest.mark.parametrize("executor", ["auto", "xla"])
@pytest.mark.parametrize(
    ("layer", "said"),
    [(0, "from layer 1 on"), (1, "from layer 2 on"), (2, "the keys and values of all layers are finite")],
)
def test_logits_that_are_not_finite_end_a_generation_and_name_the_layer(layer, said, executor):
    with pytest.raises(jsparse.JsparseError, match="are not finite") as caught:
        jsparse.generate(overflowing(layer, 7), [1, 2, 3], max_new_tokens=4, executor=executor)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def overflows_after(tmp_path, script: str) -> jsparse.Params:
    """A model that says the script and whose next logits are infinite: the last token's embedding is enormous."""
    tokenizer = byte_level()
    tokens = tokenizer.encode(script).ids
    directory = write_tokenizer(
        write_scripted(tmp_path / "m", tokens, 264), tokenizer, {"tokenizer_class": "Qwen2Tokenizer"}
    )
    params = jsparse.load(directory)
    head = params.weights.head.at[:, tokens[-1]].set(3e38)
    norm = jnp.full_like(params.weights.norm, 100)
    return dataclasses.replace(params, weights=dataclasses.replace(params.weights, head=head, norm=norm))


@pytest.mark.parametrize("executor", ["auto", "xla"])
def test_a_sequence_that_overflows_while_decoding_ends_there(executor, tmp_path):
    params = overflows_after(tmp_path, "Abcdefgh")
    pieces = jsparse.generate(params, "A", max_new_tokens=20, executor=executor, stream=True)
    got = []
    with pytest.raises(jsparse.JsparseError, match=r"sequence 0: keys, values or logits at position 7 are not finite"):
        got.extend(pieces)
    assert "".join(got) == "bcdefgh"
    with pytest.raises(jsparse.JsparseError, match=r"sequence 1: keys, values or logits at position 5"):
        jsparse.generate(params, ["x", "cdefg", "c"], max_new_tokens=20, executor=executor)


def test_an_answer_that_has_ended_is_not_lost_to_what_would_have_come(tmp_path):
    params = overflows_after(tmp_path, "Abcdefgh")
    assert jsparse.generate(params, "A", max_new_tokens=20, stop="g") == "bcdef"
    assert jsparse.generate(params, ["A", "d"], max_new_tokens=20, stop=["g"]) == ["bcdef", "ef"]
    assert jsparse.generate(params, "A", max_new_tokens=7) == "bcdefgh"


def test_a_cache_that_cannot_hold_what_comes_says_so(tmp_path, monkeypatch):
    """The look at the prompt's keys is taken away, so that float16 is kept for values that it cannot hold."""
    monkeypatch.setattr(loop, "_largest", lambda caches: 0)
    params = jsparse.load(float16_checkpoint(tmp_path, 15000))
    with pytest.raises(jsparse.JsparseError, match=r"from layer \d on \(cache in float16\).*dtype='float32'"):
        jsparse.generate(params, PROMPT, max_new_tokens=12, executor="xla")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_key_that_float16_loses_while_decoding_is_not_passed_over(dtype, tmp_path):
    """An infinite key has a score of minus infinity: attention passes over it and the logits stay finite."""
    tokenizer = byte_level()
    script = tokenizer.encode("A ok!\nBcdefg").ids
    directory = write_scripted(tmp_path / "m", script, 264)
    tensors = load_file(directory / "model.safetensors")
    attention = "model.layers.0.self_attn."
    loud = tokenizer.encode("B").ids[0]
    for head in range(4):
        tensors[f"{attention}k_proj.weight"][head * 66 + 32, loud] = 6000
        tensors[f"{attention}q_proj.weight"][head * 66 + 32] = -1e-7
    tensors[f"{attention}v_proj.weight"][loud, loud] = 50
    tensors[f"{attention}o_proj.weight"] = np.eye(264, dtype=np.float32)
    save_file(tensors, directory / "model.safetensors")
    write_tokenizer(directory, tokenizer, {"tokenizer_class": "Qwen2Tokenizer"})
    right = jsparse.generate(jsparse.load(directory, dtype=dtype), "A", max_new_tokens=12)
    assert right == " ok!\nBcccccc"
    with pytest.raises(jsparse.JsparseError, match=r"keys, values or logits at position 6 .*layer 0.*cache in float16"):
        jsparse.generate(jsparse.load(directory, dtype="float16"), "A", max_new_tokens=12)
    # In a prompt it is seen in time: the cache is float32.
    short = jsparse.generate(jsparse.load(directory, dtype="float16"), "A ok!\nB", max_new_tokens=5)
    assert short == "ccccc"


@pytest.mark.parametrize(
    "options",
    [{"temperature": value} for value in (None, "1", [0.5], True, 1j)]
    + [{"top_p": value} for value in (None, "0.9", True)]
    + [{"top_k": value} for value in ("5", 2.5, True)]
    + [{"max_new_tokens": value} for value in (None, "5", 2.5, True)]
    + [{"seed": value} for value in (None, "0", 0.5, True)]
    + [{"stream": value} for value in (None, "no", 0)]
    + [{"sparse": value} for value in ("yes", 1)]
    + [{"executor": value} for value in (None, 3, ["cpu"])]
    + [{"pipeline": value} for value in (None, ["sequential"])]
    + [{"on_finish": value} for value in (3, "print")]
    + [{"stop": value} for value in (3, 0, [None], {"a": 1}, [b"a"], np.array(["a"]))]
    + [{"tools": value} for value in (5, "add", [{"type": "function"}])]
    + [{"temperature": 10**400}, {"top_p": 10**400}],
    ids=str,
)
def test_options_of_the_wrong_type(options, default):
    with pytest.raises(jsparse.JsparseError) as caught:
        jsparse.generate(default, "a", **({"max_new_tokens": 2} | options))
    assert next(iter(options)) in str(caught.value)
    assert "\n" not in str(caught.value)


MIXED_TEXTS = ([[{"role": "user", "content": "a"}, "b"]], [[[1, 2], [3]]], [3], [[0.5]])


@pytest.mark.parametrize("texts", MIXED_TEXTS, ids=str)
def test_texts_of_mixed_kinds(texts, default):
    with pytest.raises(jsparse.JsparseError, match="a calibration text must be"):
        jsparse.fit_predictors(default, texts)


FIT = """
import sys
import numpy as np
import jsparse
params = jsparse.load(sys.argv[1])
tokens = [np.arange(2000) % 97]
for options in (
    {"rank": "8"}, {"rank": True}, {"rank": 2.5}, {"bits": "4"}, {"bits": None},
    {"sparsity": "0.9"}, {"sparsity": None}, {"tokens": "x"}, {"tokens": 100.5}, {"seed": None}, {"seed": 0.5},
    {"whiten": "no"}, {"center": 1}, {"refit": None}, {"bias": None}, {"importance": 3}, {"silenced": ["spare"]},
    {"on_layer": 3}, {"state_dir": 3}, {"texts": None}, {"texts": 3}, {"texts": {"a": 1}}, {"texts": b"text"},
    {"params": None}, {"params": "default"}, {"params": {}}, {"texts": np.array("abc")}, {"state_dir": "\\ud800"},
):
    try:
        jsparse.fit_predictors(**({"params": params, "texts": tokens} | options))
        print("accepted", options)
    except jsparse.JsparseError as error:
        named = next(iter(options)) in str(error) and "\\n" not in str(error)
        print("refused" if named else f"badly said: {error}")
    except Exception as error:
        print(options, repr(error))
"""


def test_calibration_options_of_the_wrong_type(tiny, tmp_path):
    """In a process of its own: here annotations are checked before the function is."""
    jsparse.save(tiny, tmp_path / "m")
    done = subprocess.run([sys.executable, "-c", FIT, str(tmp_path / "m")], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["refused"] * 28, done.stderr


@pytest.mark.parametrize("params", [None, "default", {}], ids=str)
def test_models_that_are_none(params, tmp_path):
    for call in (
        lambda: jsparse.generate(params, "a"),
        lambda: jsparse.save(params, tmp_path / "m"),
        lambda: convert.to_huggingface(params, tmp_path / "m"),
        lambda: convert.export_predictors(params, tmp_path / "m"),
    ):
        with pytest.raises(jsparse.JsparseError, match="must be a model from"):
            call()


def test_a_state_directory_that_cannot_be_made(tiny, tiny_tokens, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / ("a" * 300)):
        with pytest.raises(jsparse.JsparseError, match="cannot be written"):
            jsparse.fit_predictors(tiny, tiny_tokens, rank=4, state_dir=path)


def test_numbers_of_numpy_are_numbers(default):
    options = {"temperature": np.float32(0.5), "top_p": np.float64(0.9), "top_k": np.int64(4), "seed": np.int32(1)}
    text = jsparse.generate(default, "a", max_new_tokens=np.int64(3), stream=False, **options)
    assert text == jsparse.generate(default, "a", max_new_tokens=3, temperature=0.5, top_p=0.9, top_k=4, seed=1)


def test_answers_that_the_context_cuts_are_said_to_be_cut(caplog):
    params = random_params(dataclasses.replace(TINY, context_length=40))

    def said(prompt, **options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="jsparse"):
            jsparse.generate(params, prompt, **options)
        return [record.getMessage() for record in caplog.records]

    full = "ended before max_new_tokens: the context of 40 tokens is full"
    assert said([1] * 30, max_new_tokens=11) == [f"the completion {full}"]
    assert said([1] * 30, max_new_tokens=10) == []
    assert said([[1] * 30, [1] * 5], max_new_tokens=11) == [f"1 of 2 completions {full}"]
    assert said([1] * 39, max_new_tokens=2) == [f"the completion {full}"]
    eos = jsparse.generate(params, [1] * 30, max_new_tokens=1)[0]
    ending = dataclasses.replace(params, config=dataclasses.replace(params.config, eos_token_ids=(int(eos),)))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="jsparse"):
        jsparse.generate(ending, [1] * 30, max_new_tokens=20)
    assert not caplog.records


def test_a_stop_text_that_ends_an_answer_is_no_full_context(tmp_path, caplog):
    script = byte_level().encode("A ok!Bcdef").ids
    directory = write_scripted(tmp_path / "m", script, 264, max_position_embeddings=10)
    params = jsparse.load(write_tokenizer(directory, byte_level(), {"tokenizer_class": "Qwen2Tokenizer"}))
    with caplog.at_level(logging.WARNING, logger="jsparse"):
        assert jsparse.generate(params, "A", max_new_tokens=50, stop="e") == " ok!Bcd"
        assert not caplog.records
        assert jsparse.generate(params, "A", max_new_tokens=50) == " ok!Bcdef"
    assert len(caplog.records) == 1


# Prompt files and terminals.

TEXT = "abc " * 50
FILES = {
    "bom.jsonl": (b"\xef\xbb\xbf" + json.dumps({"text": TEXT}).encode(), [TEXT]),
    "bom.txt": (b"\xef\xbb\xbf" + TEXT.encode(), [TEXT]),
    "empty.jsonl": (
        f'{json.dumps({"text": TEXT})}\n{{"text": ""}}\n\n{json.dumps({"text": TEXT})}\n'.encode(),
        [TEXT] * 2,
    ),
    "crlf.jsonl": (f"{json.dumps({'text': TEXT})}\r\n".encode() * 2, [TEXT] * 2),
    "crlf.txt": (b"a\r\nb\r\n", ["a\nb\n"]),
    "inside.jsonl": (json.dumps({"text": "a\ufeffb\u2028c"}, ensure_ascii=False).encode(), ["a\ufeffb\u2028c"]),
}


@pytest.mark.parametrize("name", FILES)
def test_prompt_files_as_programs_write_them(name, tmp_path):
    content, texts = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("abc".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b'{"text": null}', "line 1 has neither"),
        (b'{"text": "", "messages": 3}', "line 1 has neither"),
        (b'{"messages": []}', "line 1 has neither"),
        (b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_prompt_files_that_are_none(content, said, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(jsparse.JsparseError, match=said):
        read_prompts(tmp_path / "p.jsonl")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A checkpoint that continues "A" with " é€日!" in a folder that rich would take for markup."""
    tokenizer = byte_level()
    script = [*tokenizer.encode("A é€日!").ids, 256]
    directory = tmp_path_factory.mktemp("speaker") / "m [/INST]"
    write_scripted(directory, script, 264, eos_token_id=256)
    return write_tokenizer(directory, tokenizer, {"tokenizer_class": "Qwen2Tokenizer"})


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "ascii", "gbk"])
def test_any_terminal_shows_any_text(encoding, speaker):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "jsparse", "generate", str(speaker), "A", "--max-new-tokens", "12"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip(b"\n") == " é€日!".encode(encoding, "backslashreplace")


def test_a_byte_order_mark_is_no_part_of_a_prompt(speaker):
    command = [sys.executable, "-m", "jsparse", "generate", str(speaker), "-", "--max-new-tokens", "3"]
    done = subprocess.run(command, input=b"\xef\xbb\xbfA", capture_output=True)
    assert done.stdout.rstrip(b"\n") == " é".encode()
    closed = subprocess.run(f"{' '.join(map(repr, command))} <&-", shell=True, capture_output=True, text=True)
    assert closed.returncode == 2
    assert "standard input is closed" in closed.stderr


def test_a_prompt_is_never_read_with_two_bos_tokens_in_a_chat(tmp_path):
    template = "{{ bos_token }}{{ messages[0].content }}"
    directory = write_scripted(tmp_path / "m", [1, 2], 360)
    write_tokenizer(directory, byte_fallback(), LLAMA | {"chat_template": template})
    assert jsparse.load(directory).tokenizer.encode_chat([{"role": "user", "content": "a"}]).count(1) == 1


def test_tokenizers_of_python_still_save(tmp_path):
    params = dataclasses.replace(random_params(dataclasses.replace(TINY, vocab_size=257)), tokenizer=byte_tokenizer())
    jsparse.save(params, tmp_path / "m")
    assert jsparse.load(tmp_path / "m").tokenizer.encode("é") == params.tokenizer.encode("é")


def test_prompts_from_a_pipe_are_read_once(tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    line = json.dumps({"text": TEXT})
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(tmp_path / 'p.jsonl')!r}, 'w').write({line!r})"])
    assert read_prompts(tmp_path / "p.jsonl") == [TEXT]
    assert writer.wait() == 0


def test_a_closed_output_is_no_success(speaker):
    command = [sys.executable, "-m", "jsparse", "generate", str(speaker), "A", "--max-new-tokens", "2"]
    closed = subprocess.run(f"{' '.join(map(repr, command))} >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert closed.returncode == 2
    assert "standard output is closed" in closed.stderr
    full = subprocess.run(f"{sys.executable} -m jsparse info nowhere 2>/dev/full", shell=True)
    assert full.returncode == 2


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
def test_lone_surrogates_are_named(text, default):
    with pytest.raises(jsparse.JsparseError, match="not valid Unicode"):
        jsparse.generate(default, text)


def test_callbacks_run_under_the_settings_of_the_caller(default, tiny, tiny_tokens):
    seen = []
    with jax.enable_x64(True):
        jsparse.generate(default, "a", max_new_tokens=3, on_finish=lambda _: seen.append(jax.config.jax_enable_x64))
        pieces = jsparse.generate(
            default, "a", max_new_tokens=3, stream=True, on_finish=lambda _: seen.append(jax.config.jax_enable_x64)
        )
        list(pieces)
        jsparse.fit_predictors(tiny, tiny_tokens, rank=4, on_layer=lambda _: seen.append(jax.config.jax_enable_x64))
    assert seen == [True] * (2 + tiny.config.num_layers)
