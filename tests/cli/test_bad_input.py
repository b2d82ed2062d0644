"""Every mistake of a user's is one sentence that names what is wrong: a JsparseError, or one line and exit code 2."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params
from tokenizer_files import byte_tokenizer

import jsparse
from jsparse.cli import calibrate, info, main

ROOT = Path(__file__).parents[2]
SMALL = dataclasses.replace(
    TINY, hidden_size=32, intermediate_size=48, num_heads=2, num_layers=2, vocab_size=257, context_length=40
)
TEXT = "the quick brown fox jumps over the lazy dog. " * 12
TEMPLATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ messages[0].content }}"
)


@pytest.fixture(scope="module")
def small() -> jsparse.Params:
    return dataclasses.replace(random_params(SMALL), tokenizer=byte_tokenizer(TEMPLATE))


@pytest.fixture(scope="module")
def fitted(small) -> jsparse.Params:
    return jsparse.fit_predictors(small, TEXT, rank=4)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    jsparse.save(small, directory)
    return directory


@pytest.fixture(scope="module")
def swiglu_saved(small, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "swiglu"
    jsparse.save(dataclasses.replace(small, config=dataclasses.replace(SMALL, ffn_kind="swiglu")), directory)
    return directory


@pytest.fixture(scope="module")
def damaged_saved(small, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "damaged"
    jsparse.save(damaged(small), directory)
    return directory


def damaged(params: jsparse.Params) -> jsparse.Params:
    """One weight of the second layer is NaN."""
    ffn = params.weights.layers[1].ffn
    ffn = dataclasses.replace(ffn, up=ffn.up.at[3, 4].set(jnp.nan))
    return dataclasses.replace(params, weights=params.weights.replace_layer(1, ffn=ffn))


PROMPTS = {
    "None": (None, "a prompt cannot be of type NoneType"),
    "a number": (3, "a prompt cannot be of type int"),
    "a float": (1.5, "a prompt cannot be of type float"),
    "bytes": (b"abc", "a prompt cannot be of type bytes"),
    "a dictionary": ({"role": "user", "content": "a"}, "a prompt cannot be of type dict"),
    "a set": ({1, 2}, "a prompt cannot be of type set"),
    "empty text": ("", "the prompt is empty"),
    "no prompts": ([], "the prompt is empty"),
    "a prompt without ids": ([[]], "a list of prompts must hold"),
    "an array without prompts": (np.zeros((0, 3), int), "the prompt is empty"),
    "empty ids": (np.zeros(0, int), "the prompt is empty"),
    "one of several is empty": (["a", ""], "prompt 1 is empty"),
    "floats": (np.array([1.0, 2.0]), "a prompt cannot be"),
    "rows of floats": (np.ones((2, 3)), "a list of prompts must hold"),
    "a list of floats": ([1.0, 2.0], "a list of prompts must hold"),
    "three axes": (np.zeros((2, 2, 2), int), "a prompt cannot be of type ndarray"),
    "a scalar array": (np.array(3), "a prompt cannot be of type ndarray"),
    "text and ids": (["a", [1, 2]], "a list of prompts must hold"),
    "text and None": (["a", None], "a list of prompts must hold"),
    "ids and text": ([1, "a"], "a list of prompts must hold"),
    "message and text": ([{"role": "user", "content": "a"}, "b"], "a list of prompts must hold"),
    "message without content": ([{"role": "user"}], "needs the keys 'role' and 'content'"),
    "message without keys": ([{}], "needs the keys 'role' and 'content'"),
    "the template refuses": ([{"role": "system", "content": "a"}], "roles must alternate"),
    "a chat of no tokens": ([{"role": "user", "content": ""}], "the prompt is empty"),
    "id too large": ([1, 2, 257], "the prompt has token id 257; the vocabulary is 0 to 256"),
    "id negative": ([[1], [-1]], "prompt 1 has token id -1"),
    "id enormous": (np.array([2**40]), f"token id {2**40}"),
    "too long": ("x" * 40, "the prompt has 40 tokens; the context is 40"),
    "one of several too long": (["x", "x" * 41], "prompt 1 has 41 tokens; the context is 40"),
    "lone surrogate": ("a\udcff", "the prompt"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name, small):
    prompt, message = PROMPTS[name]
    with pytest.raises(jsparse.JsparseError) as caught:
        jsparse.generate(small, prompt, max_new_tokens=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


OPTIONS = {
    "temperature negative": ({"temperature": -0.1}, "temperature is -0.1"),
    "temperature nan": ({"temperature": float("nan")}, "temperature is nan"),
    "top_k zero": ({"top_k": 0}, "top_k is 0"),
    "top_p zero": ({"top_p": 0.0}, "top_p is 0.0"),
    "top_p above one": ({"top_p": 1.01}, "top_p is 1.01"),
    "top_p nan": ({"top_p": float("nan")}, "top_p is nan"),
    "all of them": (
        {"temperature": -1.0, "top_k": -1, "top_p": 2.0},
        "temperature is -1.0 and must be at least 0; top_k",
    ),
    "max_new_tokens zero": ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    "max_new_tokens negative": ({"max_new_tokens": -5}, "max_new_tokens is -5"),
    "max_new_tokens broken": ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
    "seed too large": ({"seed": 2**31}, f"seed is {2**31}"),
    "seed too small": ({"seed": -(2**31) - 1}, "seed is -2147483649"),
    "seed broken": ({"seed": 1.5}, "seed is 1.5"),
    "seed nan": ({"seed": float("nan")}, "seed is nan"),
    "seed text": ({"seed": "a"}, "seed is a"),
    "executor": ({"executor": "tpu"}, "executor 'tpu' does not exist; choose from auto, cuda, cann, cpu, xla"),
    "pipeline": ({"pipeline": "fast"}, "pipeline is 'fast'"),
    "kv_dtype": ({"kv_dtype": "int4"}, "kv_dtype is 'int4'; it must be one of float32, bfloat16, float16, int8"),
    "kv_dtype of another type": ({"kv_dtype": ["int8"]}, "kv_dtype is ['int8']"),
    "sparse without predictors": ({"sparse": True}, "sparse=True needs predictors"),
    "empty stop": ({"stop": ["a", ""]}, "a stop string is empty"),
    "stop of numbers": ({"stop": [1]}, "stop"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_generation_options(name, stream, small):
    options, message = OPTIONS[name]
    with pytest.raises(jsparse.JsparseError) as caught:
        jsparse.generate(small, "ab", **({"max_new_tokens": 2, "stream": stream} | options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"seed": 2**31 - 1}, {"seed": -(2**31)}, {"top_p": 1.0}, {"top_k": 10**6}, {"seed": np.int64(2)}]
)
def test_the_ends_of_the_ranges_are_accepted(options, small):
    assert len(jsparse.generate(small, [1, 2], max_new_tokens=2, temperature=1.0, **options)) == 2


@pytest.mark.parametrize("top_p", [1e-30, 1e-40, 1e-300])
def test_the_smallest_top_p_keeps_the_most_likely_token(top_p, small):
    greedy = jsparse.generate(small, [1, 2], max_new_tokens=6)
    assert greedy.any()
    found = jsparse.generate(small, [1, 2], max_new_tokens=6, temperature=1.0, top_p=top_p)
    np.testing.assert_array_equal(found, greedy)


@pytest.mark.parametrize("wanted", [2**31, 10**20])
def test_more_tokens_than_any_context_has(wanted, small):
    found = jsparse.generate(small, [1, 2], max_new_tokens=wanted)
    np.testing.assert_array_equal(found, jsparse.generate(small, [1, 2], max_new_tokens=small.config.context_length))


def test_stop_strings_and_streams_that_do_not_fit_the_prompts(small):
    with pytest.raises(jsparse.JsparseError, match="stop strings need text prompts"):
        jsparse.generate(small, [1, 2], stop="a")
    with pytest.raises(jsparse.JsparseError, match="stream=True takes a single prompt; 2 were given"):
        jsparse.generate(small, ["a", "b"], stream=True)


def test_text_without_a_tokenizer(small):
    bare = dataclasses.replace(small, tokenizer=None)
    with pytest.raises(jsparse.JsparseError, match="no tokenizer; pass arrays of token ids"):
        jsparse.generate(bare, "a")
    with pytest.raises(jsparse.JsparseError, match="no tokenizer; give calibration texts as arrays"):
        jsparse.fit_predictors(bare, "a" * 400)
    with pytest.raises(jsparse.JsparseError, match="no chat template"):
        jsparse.generate(dataclasses.replace(small, tokenizer=byte_tokenizer()), [{"role": "user", "content": "a"}])


CALIBRATION = {
    "rank zero": ({"rank": 0}, "rank is 0; it must be between 1 and the hidden size 32"),
    "rank above the hidden size": ({"rank": 33}, "rank is 33"),
    "one rank of several": ({"rank": (4, 40)}, "rank is 40"),
    "too few ranks": ({"rank": (4,)}, "rank has 1 values; the model has 2 layers"),
    "sparsity above one": ({"sparsity": 1.1}, "sparsity is 1.1"),
    "sparsity negative": ({"sparsity": -0.1}, "sparsity is -0.1"),
    "sparsity nan": ({"sparsity": float("nan")}, "sparsity is nan"),
    "bits": ({"bits": 5}, "bits is 5"),
    "tokens": ({"tokens": 0}, "tokens is 0"),
    "tokens too few": ({"tokens": 20, "rank": 8}, "calibration has 20 tokens; rank 8 needs at least 32"),
    "too little text": ({"texts": "abc"}, "calibration has 3 tokens; rank 8 needs at least 32"),
    "no text": ({"texts": []}, "calibration has 0 tokens"),
    "ids outside": ({"texts": [np.arange(400)]}, "0 to 256"),
    "ids of floats": ({"texts": [np.ones(400)]}, "must be a string, a chat or a 1-D array"),
    "a message on its own": ({"texts": [{"role": "user", "content": "a"}]}, "must be a string, a chat or a 1-D array"),
    "None among texts": ({"texts": [TEXT, None]}, "must be a string, a chat or a 1-D array"),
    "chat without content": ({"texts": [[{"role": "user"}]]}, "needs the keys 'role' and 'content'"),
}


@pytest.mark.parametrize("name", CALIBRATION)
def test_calibration(name, small, tmp_path):
    options, message = CALIBRATION[name]
    with pytest.raises(jsparse.JsparseError) as caught:
        jsparse.fit_predictors(small, **({"texts": TEXT, "state_dir": tmp_path / "state"} | options))
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("option", "value"), [("bias", "row"), ("importance", "x")])
def test_ablations_that_do_not_exist(option, value):
    """Set behind the back of the annotations, which only the tests check."""
    options = jsparse.CalibrationOptions()
    object.__setattr__(options, option, value)
    with pytest.raises(jsparse.JsparseError, match=f"{option} is '{value}'"):
        options.check(SMALL)


def test_calibration_refuses_what_has_no_zeros(small):
    dense = dataclasses.replace(small, config=dataclasses.replace(SMALL, ffn_kind="swiglu"))
    with pytest.raises(jsparse.JsparseError, match="a swiglu FFN has no zero neurons to predict"):
        jsparse.fit_predictors(dense, TEXT)


def test_calibration_finds_the_damaged_layer(small):
    with pytest.raises(jsparse.JsparseError, match="layer 1 gives NaN or infinite activations"):
        jsparse.fit_predictors(damaged(small), TEXT)
    embed = dataclasses.replace(small.weights, embed=small.weights.embed.at[:, 0].set(jnp.inf))
    with pytest.raises(jsparse.JsparseError, match="layer 0 gives NaN or infinite activations"):
        jsparse.fit_predictors(dataclasses.replace(small, weights=embed), TEXT)


@pytest.fixture
def unprivileged(tmp_path):
    """As a user who may not enter tmp_path."""
    if os.geteuid():
        tmp_path.chmod(0)
        yield
        tmp_path.chmod(0o700)
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_paths_that_may_not_be_entered(tmp_path, unprivileged):
    with pytest.raises(jsparse.JsparseError, match=str(tmp_path)):
        jsparse.load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "other", "long"])
def test_paths_that_hold_no_model(kind, tmp_path):
    path = tmp_path / ("x" * 300 if kind == "long" else "x")
    if kind == "file":
        path.write_text("x")
    elif kind in ("empty", "other"):
        path.mkdir()
    if kind == "other":
        (path / "notes.txt").write_text("x")
    with pytest.raises(jsparse.JsparseError, match=str(path)):
        jsparse.load(path)


def refused(capsys, main, *arguments: object, code: int = 2) -> str:
    """Run a command that must fail; its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr().err
    assert caught.value.code == code
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert printed.endswith("\n")
    return printed


COMMANDS = {
    "generate: missing path": (["generate", "NOWHERE", "a"], "NOWHERE: no such file"),
    "info: missing path": (["info", "NOWHERE"], "NOWHERE: no such file"),
    "info: a file": (["info", "FILE"], "FILE"),
    "info: not a checkpoint": (["info", "EMPTY"], "EMPTY"),
    "info: FFN kind of a jsparse directory": (
        ["info", "SAVED", "--ffn", "drelu"],
        "ffn is chosen on conversion",
    ),
    "generate: empty": (["generate", "SAVED", ""], "the prompt is empty"),
    "generate: too long": (["generate", "SAVED", "x" * 50], "has 50 tokens"),
    "generate: temperature": (["generate", "SAVED", "a", "--temperature", "-1"], "temperature is -1.0"),
    "generate: top-k": (["generate", "SAVED", "a", "--top-k", "0"], "top_k is 0"),
    "generate: top-p": (["generate", "SAVED", "a", "--top-p", "2"], "top_p is 2.0"),
    "generate: max-new-tokens": (["generate", "SAVED", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "generate: seed": (["generate", "SAVED", "a", "--seed", str(2**40)], "seed is"),
    "generate: empty stop": (["generate", "SAVED", "a", "--stop", ""], "a stop string is empty"),
    "generate: broken text": (["generate", "SAVED", "a\udcff"], "prompt"),
    "generate: executor": (["generate", "SAVED", "a", "--executor", "tpu"], "tpu"),
    "generate: no number": (["generate", "SAVED", "a", "--seed", "x"], "seed"),
    "generate: no prompt": (["generate", "SAVED"], "prompt"),
    "no command": ([], "command"),
    "unknown command": (["frobnicate"], "frobnicate"),
    "unknown option": (["info", "SAVED", "--frobnicate"], "frobnicate"),
    "calibrate: output exists": (["calibrate", "SAVED", "--output", "SAVED"], "SAVED exists"),
    "calibrate: output is something else": (["calibrate", "SAVED", "--output", "EMPTY/..", "--force"], "left alone"),
    "calibrate: missing path": (["calibrate", "NOWHERE", "--output", "OUT"], "NOWHERE: no such file"),
    "calibrate: no prompts": (["calibrate", "SAVED", "--output", "OUT"], "SAVED comes without calibration text"),
    "calibrate: swiglu": (["calibrate", "SWIGLU", "--prompts", "TEXT", "--output", "OUT"], "swiglu FFN has no zero"),
    "calibrate: damaged": (["calibrate", "DAMAGED", "--prompts", "TEXT", "--output", "OUT"], "layer 1 gives NaN"),
}
for option, value, said in (
    ("--rank", "0", "rank is 0"),
    ("--rank", "33", "rank is 33"),
    ("--rank", "1,2,3", "rank has 3 values"),
    ("--rank", "x", "'x' is not a number"),
    ("--bits", "5", "bits is 5"),
    ("--sparsity", "1.5", "sparsity is 1.5"),
    ("--tokens", "0", "tokens is 0"),
    ("--tokens", "10", "calibration has 10 tokens"),
    ("--seed", "-1", "seed is -1"),
    ("--bias", "row", "row"),
):
    arguments = ["calibrate", "SAVED", "--prompts", "TEXT", "--output", "OUT", option, value]
    COMMANDS[f"calibrate: {option} {value}"] = (arguments, said)
for file, said in (
    ("NOWHERE.txt", "NOWHERE.txt: No such file"),
    ("NOWHERE.jsonl", "NOWHERE.jsonl: No such file"),
    ("EMPTY", "come as .txt or .jsonl"),
    ("folder.txt", "folder.txt: Is a directory"),
    ("folder.jsonl", "folder.jsonl: Is a directory"),
    ("latin.txt", "latin.txt: is not UTF-8 text (byte 2)"),
    ("latin.jsonl", "latin.jsonl: is not UTF-8 text (byte 11)"),
    ("empty.txt", "calibration has 0 tokens"),
    ("empty.jsonl", "calibration has 0 tokens"),
    ("bad.jsonl", "bad.jsonl: line 2 is not JSON; line 4 has neither"),
    ("many.jsonl", "line 5 is not JSON and 4 more"),
    ("nomessages.jsonl", "nomessages.jsonl: line 1"),
    ("norole.jsonl", "needs the keys 'role' and 'content'"),
    ("refused.jsonl", "roles must alternate"),
):
    COMMANDS[f"calibrate: prompts {file}"] = (["calibrate", "SAVED", "--prompts", file, "--output", "OUT"], said)


@pytest.fixture
def places(saved, swiglu_saved, damaged_saved, tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    files = {
        "FILE": b"x",
        "TEXT.txt": TEXT.encode(),
        "latin.txt": b"ab\xff",
        "latin.jsonl": b'{"text": "a\xe9"}\n',
        "empty.txt": b"",
        "empty.jsonl": b"\n\n",
        "bad.jsonl": b'{"text": "a"}\n{"text": \n\n["x"]\n{"text": "b"}\n',
        "many.jsonl": b"x\n" * 9,
        "nomessages.jsonl": b'{"messages": []}\n',
        "norole.jsonl": b'{"messages": [{"content": "a"}]}\n',
        "refused.jsonl": b'{"messages": [{"role": "system", "content": "a"}]}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return {"SAVED": str(saved), "SWIGLU": str(swiglu_saved), "DAMAGED": str(damaged_saved), "TEXT": "TEXT.txt"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, places, tmp_path, capsys):
    arguments, message = COMMANDS[name]
    arguments = [places.get(argument, argument) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    printed = refused(capsys, main.main, *arguments)
    assert message.replace("SAVED", places["SAVED"]) in printed
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all("OUT.unfinished" in str(path) for path in left)
    assert not left or "damaged" in name
    if arguments[:1] == ["calibrate"]:
        assert refused(capsys, calibrate.main, *arguments[1:]) == printed


@pytest.mark.parametrize("text", [b"a\xff", b""])
def test_standard_input_that_is_no_text(text, saved, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
    refused(capsys, main.main, "generate", saved, "-")


@pytest.mark.parametrize("place", ["jsparse.predictors.state._replace", "jsparse.checkpoints.native._save_arrays"])
def test_a_full_disk(place, places, saved, tmp_path, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "OUT")

    arguments = (saved, "--prompts", "TEXT.txt", "--output", "OUT", "--rank", 4)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        assert "No space left on device" in refused(capsys, calibrate.main, *arguments)
    assert not (tmp_path / "OUT").exists()
    calibrate.main([str(argument) for argument in arguments])
    assert jsparse.load(tmp_path / "OUT").predictors is not None


def test_ctrl_c_in_process(places, saved, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "load", interrupt)
    assert refused(capsys, main.main, "info", saved, code=130) == "error: interrupted\n"


def run(*arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, children would inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def test_a_real_process_says_one_line():
    process = run("jsparse", "info", "/nowhere")
    printed, errors = process.communicate()
    assert (process.returncode, printed, errors) == (2, "", "error: /nowhere: no such file or directory\n")


def test_ctrl_c_while_calibrating(places, saved, tmp_path):
    process = run("jsparse", "calibrate", saved, "--prompts", tmp_path / "TEXT.txt", "--output", tmp_path / "OUT")
    while process.poll() is None and not (tmp_path / "OUT.unfinished").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert not (tmp_path / "OUT").exists()
