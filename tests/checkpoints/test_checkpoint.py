"""Saved models come back bit for bit; what cannot be saved or read leaves everything as it was and says why."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints
from conftest import TINY, random_params, stored_as
from tokenizer_files import byte_tokenizer

import jsparse
from convert import from_huggingface
from jsparse.arrays import DTYPES, restore_rows, storage_of
from jsparse.checkpoints import native
from jsparse.directories import replacing_directory
from jsparse.model.config import RopeScaling

ROOT = Path(__file__).parents[2]
SMALL = dataclasses.replace(TINY, hidden_size=32, intermediate_size=48, num_heads=2, num_layers=2, vocab_size=257)
TOKENS = [np.random.default_rng(2).integers(0, SMALL.vocab_size, 600)]


@pytest.fixture(scope="module")
def small() -> jsparse.Params:
    return dataclasses.replace(random_params(SMALL), tokenizer=byte_tokenizer("{{messages[0].content}}!"))


@pytest.fixture(scope="module")
def fitted(small) -> jsparse.Params:
    return jsparse.fit_predictors(small, TOKENS, rank=7, sparsity=0.8)


def assert_identical(ours: jsparse.Params, theirs: jsparse.Params) -> None:
    """The same configuration, structure, dtypes and bytes."""
    assert ours.config == theirs.config
    for part in ("weights", "predictors"):
        first, second = getattr(ours, part), getattr(theirs, part)
        assert jax.tree.structure(first) == jax.tree.structure(second)
        for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["Tiiny/SparseQwen2-7B", "openbmb/MiniCPM-S-1B-sft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_every_dtype(dtype, name, tmp_path):
    params = from_huggingface(random_checkpoints.row(tmp_path, name), dtype=dtype)
    jsparse.save(params, tmp_path / "saved")
    loaded = jsparse.load(tmp_path / "saved")
    assert_identical(loaded, params)
    assert loaded.predictors is None
    assert loaded.tokenizer is None
    matrices = [loaded.weights.layers[0].ffn.down_t, loaded.weights.layers[1].attention.q.rows]
    assert {str(storage_of(matrix)) for matrix in matrices} == {"int4:32" if dtype == "int4" else dtype}


def test_a_model_is_read_some_arrays_at_a_time(tmp_path, monkeypatch):
    """The parts of a low-bit matrix in different portions too: all read at once took half as much memory again."""
    params = stored_as(random_params(TINY), "int4")
    jsparse.save(params, tmp_path / "model")
    load_arrays, calls = native._load_arrays, []

    def counted(directory, storage):
        calls.append(len(storage))
        return load_arrays(directory, storage)

    monkeypatch.setattr(native, "_load_arrays", counted)
    monkeypatch.setattr(native, "_PORTION", sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights)) // 5)
    assert_identical(jsparse.load(tmp_path / "model"), params)
    assert 4 <= len(calls) <= 6
    assert sum(calls) == len(native.read_manifest(tmp_path / "model")["weights"])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_predictors_of_every_width(bits, small, tmp_path):
    """Ranks are odd, so that packed rows end in half a byte, and differ by layer."""
    params = jsparse.fit_predictors(small, TOKENS, rank=(5, 7), bits=bits)
    params = dataclasses.replace(
        params,
        predictors=(
            params.predictors[0],
            dataclasses.replace(
                params.predictors[1], bias=params.predictors[1].bias.at[:2].set(jnp.array([jnp.inf, -jnp.inf]))
            ),
        ),
    )
    jsparse.save(params, tmp_path / "saved")
    loaded = jsparse.load(str(tmp_path / "saved"))
    assert_identical(loaded, params)
    assert [predictor.rank for predictor in loaded.predictors] == [5, 7]


def test_every_field_of_the_config_comes_back(small, tmp_path):
    config = dataclasses.replace(
        SMALL,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        sliding_window=9,
        ffn_kind="fatrelu",
        ffn_threshold=0.125,
        bos_token_id=3,
        eos_token_ids=(4, 5),
        norm_eps=1e-6,
        rope_theta=123.0,
        embed_scale=1.5,
        residual_scale=0.7,
        logit_scale=0.1,
        context_length=99,
        name="a model é",
    )
    jsparse.save(random_params(config), tmp_path / "saved")
    assert jsparse.load(tmp_path / "saved").config == config


def test_generation_and_tokenizer_after_loading(fitted, tmp_path):
    jsparse.save(fitted, tmp_path / "saved")
    loaded = jsparse.load(tmp_path / "saved")
    chat = [{"role": "user", "content": "héllo"}]
    assert loaded.tokenizer.encode("héllo €") == fitted.tokenizer.encode("héllo €")
    assert loaded.tokenizer.encode_chat(chat) == fitted.tokenizer.encode_chat(chat)
    assert loaded.tokenizer.decode([1, 2, 3]) == fitted.tokenizer.decode([1, 2, 3])
    for sparse in (True, False):
        options = {"max_new_tokens": 20, "sparse": sparse}
        assert jsparse.generate(loaded, "def f(", **options) == jsparse.generate(fitted, "def f(", **options)
    jsparse.save(loaded, tmp_path / "again")
    assert_identical(jsparse.load(tmp_path / "again"), fitted)


def test_a_directory_is_readable_by_others_and_complete(fitted, tmp_path):
    jsparse.save(fitted, tmp_path / "deep" / "saved")
    assert sorted(p.name for p in (tmp_path / "deep" / "saved").iterdir()) == [
        "jsparse.json",
        "predictors",
        "tokenizer",
        "weights",
    ]
    assert (tmp_path / "deep" / "saved").stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path / "deep") == ["saved"]


def test_an_existing_directory_is_kept_unless_forced(small, fitted, tmp_path):
    saved = tmp_path / "saved"
    jsparse.save(small, saved)
    before = tree(saved)
    with pytest.raises(jsparse.JsparseError, match=f"{saved} exists; choose another name"):
        jsparse.save(fitted, saved)
    assert tree(saved) == before
    jsparse.save(fitted, saved, force=True)
    assert jsparse.load(saved).predictors is not None
    jsparse.save(small, saved, force=True)
    assert jsparse.load(saved).predictors is None
    assert os.listdir(tmp_path) == ["saved"]


@pytest.mark.parametrize("kind", ["directory", "file", "nested"])
@pytest.mark.parametrize("force", [False, True])
def test_anything_else_is_never_replaced(kind, force, small, tmp_path):
    target = tmp_path / "mine"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "keep").write_text("mine")
    if kind == "nested":
        (target / "jsparse.json").mkdir()
    with pytest.raises(jsparse.JsparseError, match=str(target)):
        jsparse.save(small, target, force=force)
    assert (target if kind == "file" else target / "keep").read_text() == "mine"
    assert os.listdir(tmp_path) == ["mine"]


def test_an_empty_directory_is_taken_with_force(small, tmp_path):
    (tmp_path / "empty").mkdir()
    jsparse.save(small, tmp_path / "empty", force=True)
    assert_identical(jsparse.load(tmp_path / "empty"), small)


FAILURES = {
    "full disk": (OSError(28, "No space left on device"), jsparse.JsparseError),
    "Ctrl-C": (KeyboardInterrupt(), KeyboardInterrupt),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("place", ["_save_arrays", "predictors", "tokenizer", "manifest", "rename", "second rename"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_while_writing_changes_nothing(failure, place, exists, small, fitted, tmp_path, monkeypatch):
    if place == "second rename" and not exists:
        pytest.skip("there is one rename only where nothing is replaced")
    error, raised = FAILURES[failure]
    saved = tmp_path / "saved"
    if exists:
        jsparse.save(small, saved)
        before = tree(saved)
    calls = 0

    def failing_on(number, original):
        def function(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                raise error
            return original(*arguments, **options)

        return function

    owner, name, number = {
        "_save_arrays": (jsparse.checkpoints.native, "_save_arrays", 1),
        "predictors": (jsparse.checkpoints.native, "_save_arrays", 2),
        "tokenizer": (type(fitted.tokenizer), "save", 1),
        "manifest": (Path, "write_text", 1),
        "rename": (Path, "rename", 1),
        "second rename": (Path, "rename", 2),
    }[place]
    with monkeypatch.context() as patch:
        original = getattr(owner, name)
        patch.setattr(owner, name, failing_on(number, original))
        with pytest.raises(raised) as caught:
            jsparse.save(fitted, saved, force=exists)
    assert calls >= number
    if failure == "full disk":
        assert "No space left on device" in str(caught.value)
        assert str(saved) in str(caught.value)
    assert os.listdir(tmp_path) == (["saved"] if exists else [])
    if exists:
        assert tree(saved) == before


def test_what_a_thread_writes_after_the_error_goes_too(tmp_path):
    """A storage library's threads write on for a moment after one of them has failed."""

    def write(directory: Path) -> None:
        end = time.monotonic() + 0.3
        with contextlib.suppress(FileNotFoundError):  # the directory is gone
            for i in itertools.count():
                if time.monotonic() > end:
                    break
                (directory / f"{i}").mkdir()

    def fail() -> None:
        with replacing_directory(tmp_path / "saved") as directory:
            threading.Thread(target=write, args=(directory,)).start()
            time.sleep(0.1)
            raise OSError("full")

    with pytest.raises(jsparse.JsparseError, match="cannot be written"):
        fail()
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys
sys.path[:0] = ["tests"]
from conftest import TINY, random_params
import jsparse
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
params = random_params(TINY)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    jsparse.save(params, sys.argv[1])
except jsparse.JsparseError as error:
    print("refused:", error)
"""


def test_a_disk_that_really_refuses_to_write(tmp_path):
    """Files may not grow beyond 20 kB: what the storage library raises then is its own affair, not the user's."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "saved")],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"refused: {tmp_path / 'saved'}: cannot be written")
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def saved_once(fitted, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    jsparse.save(fitted, directory)
    return directory


@pytest.fixture
def saved(saved_once, tmp_path):
    return Path(shutil.copytree(saved_once, tmp_path / "model"))


def edited(change):
    def damage(directory):
        path = directory / "jsparse.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def rewritten(change):
    """Edited by somebody who also made the checksum anew."""

    def damage(directory):
        path = directory / "jsparse.json"
        manifest = json.loads(path.read_text())
        del manifest["checksum"]
        change(manifest)
        path.write_text(json.dumps(manifest | {"checksum": native._checksum(manifest)}))

    return damage


def largest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(directory: Path) -> None:
    """Change one bit in the middle of the largest file."""
    path = largest(directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE = {
    "config edited": (edited(lambda m: m["config"].update(rope_theta=5.0)), "jsparse.json: was changed"),
    "eos edited": (edited(lambda m: m["config"].update(eos_token_ids=[3])), "jsparse.json: was changed"),
    "storage edited": (edited(lambda m: m["weights"]["embed"].update(dtype="float16")), "jsparse.json: was changed"),
    "predictors struck out": (edited(lambda m: m.pop("predictors")), "jsparse.json: was changed"),
    "checksum gone": (edited(lambda m: m.pop("checksum")), "jsparse.json: cannot be read"),
    "another format": (edited(lambda m: m.update(format=3)), "jsparse.json: has format 3"),
    "no config": (rewritten(lambda m: m.pop("config")), "jsparse.json: does not describe a model: config is missing"),
    "weights are a list": (rewritten(lambda m: m.update(weights=[1])), "jsparse.json: does not describe a model"),
    "an array without a shape": (
        rewritten(lambda m: m["weights"]["embed"].pop("shape")),
        "jsparse.json: does not describe a model: embed lacks crc32, dtype, shape",
    ),
    "an array that is a number": (rewritten(lambda m: m["weights"].update(embed=3)), "embed lacks crc32, dtype, shape"),
    "a dtype that is none": (rewritten(lambda m: m["weights"]["embed"].update(dtype="float3")), "embed is stored as"),
    "a shape of words": (rewritten(lambda m: m["weights"]["embed"].update(shape=["a"])), "embed is stored as"),
    "a predictor of no layer": (
        rewritten(lambda m: m["predictors"].update({"one/bias": m["predictors"].pop("1/bias")})),
        "predictors: the arrays cannot be read",
    ),
    "manifest is no JSON": (lambda d: (d / "jsparse.json").write_text("{"), "jsparse.json: cannot be read"),
    "manifest is nested too deeply": (
        lambda d: (d / "jsparse.json").write_text("[" * 100_000),
        "jsparse.json: cannot be read",
    ),
    "manifest is a list": (lambda d: (d / "jsparse.json").write_text("[]"), "jsparse.json: cannot be read"),
    "manifest is empty": (lambda d: (d / "jsparse.json").write_bytes(b""), "jsparse.json: cannot be read"),
    "manifest is binary": (
        lambda d: (d / "jsparse.json").write_bytes(b"\xff\xfe"),
        "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0",
    ),
    "billions of layers": (
        rewritten(lambda m: m["config"].update(num_layers=10**9)),
        "num_layers is 1000000000, more than 10000",
    ),
    "groups that no kernel has": (
        rewritten(lambda m: m["predictors"]["0/a/values"].update(group=64)),
        "0/a/values is in groups of 64 columns; there are groups of 32 only",
    ),
    "a matrix of whole numbers": (
        rewritten(lambda m: m["weights"]["embed"].update(dtype="int32")),
        "embed",
    ),
    "weights missing": (lambda d: shutil.rmtree(d / "weights"), "weights: the arrays cannot be read"),
    "predictors missing": (lambda d: shutil.rmtree(d / "predictors"), "predictors: the arrays cannot be read"),
    "weights empty": (
        lambda d: (shutil.rmtree(d / "weights"), (d / "weights").mkdir()),
        "weights: the arrays cannot be read",
    ),
    "largest weight file missing": (lambda d: largest(d / "weights").unlink(), "weights: the arrays cannot be read"),
    "largest weight file truncated": (
        lambda d: os.truncate(largest(d / "weights"), largest(d / "weights").stat().st_size // 2),
        "weights: the arrays cannot be read",
    ),
    "largest weight file empty": (
        lambda d: os.truncate(largest(d / "weights"), 0),
        "weights: the arrays cannot be read",
    ),
    "largest weight file corrupt": (lambda d: flip(d / "weights"), "weights: the arrays cannot be read"),
    "largest predictor file corrupt": (lambda d: flip(d / "predictors"), "predictors: the arrays cannot be read"),
    "tokenizer corrupt": (lambda d: (d / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "tokenizer missing": (lambda d: shutil.rmtree(d / "tokenizer"), "tokenizer"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, saved):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(jsparse.JsparseError) as caught:
        jsparse.load(saved)
    assert message in str(caught.value)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_are_named(small, tmp_path, monkeypatch):
    """A weight that cannot be rounded, a predictor that would predict nothing, and columns that are a word."""
    ffn = small.weights.layers[1].ffn
    broken = dataclasses.replace(small.weights.layers[1], ffn=dataclasses.replace(ffn, up=ffn.up.at[3, 4].set(jnp.nan)))
    weights = dataclasses.replace(small.weights, layers=(small.weights.layers[0], broken, *small.weights.layers[2:]))
    jsparse.save(dataclasses.replace(small, weights=weights), tmp_path / "nan")
    for dtype in ("int8", "int4"):
        with pytest.raises(jsparse.JsparseError, match=f"layers/1/ffn/up does not fit in {dtype}: it holds NaN"):
            jsparse.load(tmp_path / "nan", dtype=dtype)
    fitted = jsparse.fit_predictors(small, TOKENS, rank=4, bits=4)
    spoilt = dataclasses.replace(fitted.predictors[0], bias=fitted.predictors[0].bias.at[2].set(jnp.nan))
    broken = dataclasses.replace(fitted, predictors=(spoilt, *fitted.predictors[1:]))
    with pytest.raises(jsparse.JsparseError, match="0/bias cannot be saved: it holds NaN"):
        jsparse.save(broken, tmp_path / "predictors")
    monkeypatch.setattr(native, "_check_loadable", lambda params: None)
    jsparse.save(broken, tmp_path / "predictors")
    with pytest.raises(jsparse.JsparseError, match="0/bias holds NaN"):
        jsparse.load(tmp_path / "predictors")
    jsparse.save(fitted, tmp_path / "columns")
    rewritten(lambda m: m["predictors"]["0/a/values"].update(columns="33"))(tmp_path / "columns")
    with pytest.raises(jsparse.JsparseError, match="0/a/values has '33' columns of 4 bits"):
        jsparse.load(tmp_path / "columns")


@pytest.mark.parametrize("part", ["weights", "predictors"])
def test_arrays_of_another_model_are_refused(part, saved, tmp_path):
    other = random_params(dataclasses.replace(SMALL, intermediate_size=64))
    other = jsparse.fit_predictors(other, TOKENS, rank=7)
    jsparse.save(other, tmp_path / "other")
    shutil.rmtree(saved / part)
    shutil.copytree(tmp_path / "other" / part, saved / part)
    with pytest.raises(jsparse.JsparseError, match=f"{saved / part}: the arrays cannot be read"):
        jsparse.load(saved)


OTHER = {
    "fewer layers": {"num_layers": 1},
    "narrower": {"hidden_size": 16, "num_heads": 2},
    "more neurons": {"intermediate_size": 64},
}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("where", ["save and load", "generate"])
def test_predictors_of_another_model_are_refused(name, where, small, tmp_path):
    """A Params put together by hand is refused at the latest where it is used."""
    config = dataclasses.replace(SMALL, head_dim=0, **OTHER[name])
    predictors = jsparse.fit_predictors(random_params(config), TOKENS, rank=4).predictors
    mixed = dataclasses.replace(small, predictors=predictors)
    message = "there are 1 predictors for a model of 2 layers" if name == "fewer layers" else "belong to another model"

    def use():
        if where == "generate":
            return jsparse.generate(mixed, "a", max_new_tokens=3)
        jsparse.save(mixed, tmp_path / "mixed")
        return jsparse.load(tmp_path / "mixed")

    with pytest.raises(jsparse.JsparseError, match=message):
        use()


def test_the_ffn_kind_of_a_jsparse_directory_is_settled(saved):
    with pytest.raises(jsparse.JsparseError, match="chosen on conversion"):
        jsparse.load(saved, ffn="drelu")
    with pytest.raises(jsparse.JsparseError, match="dtype is 'int3' and must be one of float32, bfloat16"):
        jsparse.load(saved, dtype="int3")


@pytest.mark.parametrize("name", ["Tiiny/SparseQwen2-7B", "openbmb/MiniCPM-S-1B-sft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_chosen_at_load_is_that_of_a_conversion(dtype, name, tmp_path):
    source = random_checkpoints.row(tmp_path, name)
    jsparse.save(from_huggingface(source), tmp_path / "saved")
    assert_identical(jsparse.load(tmp_path / "saved", dtype=dtype), from_huggingface(source, dtype=dtype))


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.02), ("int4", 0.2)])
def test_low_bit_rows_load_as_floats_again(dtype, error, small, tmp_path):
    jsparse.save(small, tmp_path / "floats")
    rounded = jsparse.load(tmp_path / "floats", dtype=dtype)
    jsparse.save(rounded, tmp_path / "rounded")
    assert_identical(jsparse.load(tmp_path / "rounded", dtype=dtype), rounded)
    loaded = jsparse.load(tmp_path / "rounded", dtype="bfloat16")
    for layer in range(SMALL.num_layers):
        found, wanted = (p.weights.layers[layer].ffn.down_t for p in (loaded, small))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=error * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_scales_that_are_not_finite_are_refused(dtype, small, tmp_path, monkeypatch):
    jsparse.save(small, tmp_path / "floats")
    rounded = jsparse.load(tmp_path / "floats", dtype=dtype)
    gate = rounded.weights.layers[1].ffn.gate
    if dtype == "int8":
        gate = dataclasses.replace(gate, scale=gate.scale.at[3, 0].set(jnp.nan))
    else:
        gate = dataclasses.replace(gate, values=gate.values.at[3, -2:].set(jnp.asarray([0, 0x7E], jnp.uint8)))
    ffn = dataclasses.replace(rounded.weights.layers[1].ffn, gate=gate)
    broken = dataclasses.replace(rounded, weights=rounded.weights.replace_layer(1, ffn=ffn))
    said = "a scale is NaN or infinite"
    with pytest.raises(jsparse.JsparseError, match=f"layers/1/ffn/gate cannot be saved: {said}"):
        jsparse.save(broken, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    monkeypatch.setattr(native, "_check_loadable", lambda params: None)
    jsparse.save(broken, tmp_path / "saved")
    wanted = re.escape(str(tmp_path / "saved")) + f".*: layers/1/ffn/gate: {said}"
    with pytest.raises(jsparse.JsparseError, match=wanted):
        jsparse.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": 99}, r"values of uint8 \(4, 36\) are not 99 columns in int4:32"),
        ({"values": np.zeros((4, 35), np.uint8)}, r"values of uint8 \(4, 35\) are not 64 columns in int4:32"),
        ({"values": np.zeros((4, 36), np.int8)}, r"values of int8 \(4, 36\) are not 64 columns in int4:32"),
        ({"codebook": np.zeros(15, np.int8)}, r"a codebook of int8 \(15,\); it has 16 numbers of int8"),
        ({"codebook": None}, "a matrix of 4 bits with no scales is unknown"),
        ({"bits": 8}, "a matrix of 8 bits with no scales is unknown"),
        (
            {"values": np.zeros((4, 64), np.int8), "scale": np.ones((4, 1), np.float16), "codebook": None, "bits": 8},
            "float16",
        ),
        ({"bits": 3, "scale": np.ones((4, 1)), "codebook": None}, "a matrix of 3 bits with scales is unknown"),
        (
            {"scale": np.ones((3, 1)), "codebook": None, "columns": 72},
            r"scales of shape \(3, 1\) do not belong to 4 rows",
        ),
    ],
)
def test_parts_that_make_no_low_bit_matrix_are_refused(changes, said):
    parts = {"values": np.zeros((4, 36), np.uint8), "scale": None, "bits": 4, "columns": 64}
    parts |= {"codebook": np.zeros(16, np.int8)} | changes
    with pytest.raises(ValueError, match=said):
        restore_rows(
            **{key: jnp.asarray(part) if isinstance(part, np.ndarray) else part for key, part in parts.items()}
        )


def test_a_weight_that_does_not_fit_the_dtype_is_refused(small, tmp_path):
    weights = dataclasses.replace(small.weights, embed=small.weights.embed.at[0, 0].set(1e6))
    jsparse.save(dataclasses.replace(small, weights=weights), tmp_path / "saved")
    with pytest.raises(jsparse.JsparseError, match="embed does not fit in float16; choose bfloat16 or float32"):
        jsparse.load(tmp_path / "saved", dtype="float16")


@pytest.fixture(scope="module")
def first_format(tmp_path_factory) -> Path:
    """Models and an unfinished calibration as version 0.1.0 left them (data/record_first_format.py)."""
    directory = tmp_path_factory.mktemp("first")
    with tarfile.open(Path(__file__).parents[1] / "data" / "first_format.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.mark.parametrize("name", ["model", "low_bit"])
def test_directories_of_the_first_format_say_what_they_said(name, first_format, tmp_path):
    expected = json.loads((first_format / "tokens.json").read_text())[name]
    params = jsparse.load(first_format / name)
    jsparse.save(params, tmp_path / "second")
    assert json.loads((tmp_path / "second" / "jsparse.json").read_text())["format"] == 2
    assert_identical(jsparse.load(tmp_path / "second"), params)
    for how, tokens in expected.items():
        found = jsparse.generate(params, [1, 2, 3], max_new_tokens=20, executor="xla", sparse=how == "sparse")
        assert found.tolist() == tokens


def test_an_unfinished_calibration_of_the_first_version_goes_on(first_format):
    fitted = jsparse.load(first_format / "model")
    reports = []
    again = jsparse.fit_predictors(
        dataclasses.replace(fitted, predictors=None),
        [np.random.default_rng(0).integers(0, 24, 600)],
        state_dir=first_format / "unfinished",
        on_layer=reports.append,
        rank=4,
        sparsity=0.7,
        tokens=500,
    )
    assert [report.layer for report in reports] == [0, 1]
    assert [predictor.rate is None for predictor in again.predictors] == [True, False]  # 0.1 counted no rates
    again, fitted = ([(p.a, p.b, p.bias) for p in params.predictors] for params in (again, fitted))
    for found, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(fitted)):
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=1e-4, atol=1e-5)
