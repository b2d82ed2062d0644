"""Paths and permissions: success is said only of what can be read back, and errors name what is there."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_params
from random_checkpoints import ROWS, random_tensors, write
from without_rights import run

import convert
import jsparse
from jsparse.checkpoints import native
from jsparse.cli.calibrate import main as calibrate

LLAMA = ROWS["dense-llama"]
NAMES = (
    "run [v2] final",
    "exp[1]/model",
    "a*b",
    "what?",
    "{a,b}",
    "back\\slash",
    "in\\a/[/INST]",
    "ü 日本",
    "x" * 250,
    "gs:",
    "a%20b",
    "\udcff",
)


@pytest.fixture(scope="module")
def small() -> jsparse.Params:
    return random_params(TINY)


def same(a: jsparse.Params, b: jsparse.Params) -> bool:
    prompt = np.arange(1, 9)
    return np.array_equal(jsparse.generate(a, prompt, max_new_tokens=5), jsparse.generate(b, prompt, max_new_tokens=5))


@pytest.mark.parametrize("name", NAMES)
def test_saving_into_any_path(name, small, tmp_path):
    jsparse.save(small, tmp_path / name)
    assert same(jsparse.load(tmp_path / name), small)
    jsparse.save(small, tmp_path / name, force=True)
    shutil.move(tmp_path / name, tmp_path / "elsewhere")
    assert same(jsparse.load(tmp_path / "elsewhere"), small)
    left = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not left


def test_a_model_moved_to_a_path_like_a_pattern_is_still_read(small, tmp_path):
    jsparse.save(small, tmp_path / "m")
    (tmp_path / "back\\s [1]").mkdir()
    shutil.move(tmp_path / "m", tmp_path / "back\\s [1]" / "m?")
    assert same(jsparse.load(tmp_path / "back\\s [1]" / "m?"), small)


def test_calibrating_into_a_path_like_a_pattern(tmp_path, capsys):
    output = tmp_path / "cal [1]" / "m\\*"
    calibrate(["default", "--output", str(output), "--rank", "8", "--tokens", "1000"])
    assert f"wrote {output}" in capsys.readouterr().out
    assert jsparse.load(output).predictors[0].rank == 8
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]


def test_exports_into_a_path_like_a_pattern(small, tmp_path):
    convert.to_huggingface(small, tmp_path / "[a]" / "b\\*")
    assert same(jsparse.load(tmp_path / "[a]" / "b\\*"), small)


def test_what_cannot_be_read_back_is_no_success(small, tmp_path, monkeypatch):
    """Orbax does not notice where the file is missing that leads to all others."""
    jsparse.save(small, tmp_path / "m")
    kept = jsparse.load(tmp_path / "m")
    write_arrays = native._save_arrays

    def lose(directory, arrays):
        write_arrays(directory, arrays)
        (directory / "manifest.ocdbt").unlink()

    monkeypatch.setattr(native, "_save_arrays", lose)
    with pytest.raises(jsparse.JsparseError, match="cannot be read"):
        jsparse.save(random_params(TINY, seed=1), tmp_path / "m", force=True)
    monkeypatch.undo()
    assert same(jsparse.load(tmp_path / "m"), kept)
    monkeypatch.setattr(native, "_save_arrays", lose)
    with pytest.raises(jsparse.JsparseError, match="cannot be read"):
        jsparse.save(small, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_calibration_that_cannot_be_saved_keeps_its_state(tmp_path, monkeypatch):
    def fail(directory, arrays):
        raise OSError("the disk is gone")

    options = ["default", "--output", str(tmp_path / "m"), "--rank", "8", "--tokens", "1000"]
    monkeypatch.setattr(native, "_save_arrays", fail)
    with pytest.raises(SystemExit):
        calibrate(options)
    assert (tmp_path / "m.unfinished").is_dir()
    monkeypatch.undo()
    calibrate(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_replacing_what_a_link_leads_to(small, tmp_path):
    jsparse.save(small, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    other = random_params(TINY, seed=1)
    jsparse.save(other, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert same(jsparse.load(tmp_path / "real"), other)
    (tmp_path / "dangling").symlink_to("nothing")
    jsparse.save(small, tmp_path / "dangling")
    assert same(jsparse.load(tmp_path / "nothing"), small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "nothing", "real"]


def test_saving_inside_a_running_event_loop(small, tmp_path):
    async def save_and_load() -> jsparse.Params:
        jsparse.save(small, tmp_path / "m")
        return jsparse.load(tmp_path / "m")

    assert same(asyncio.run(save_and_load()), small)


def test_the_home_directory(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsparse.save(small, "~/m")
    assert same(jsparse.load("~/m"), small)
    assert (tmp_path / "m").is_dir()


BAD_PATHS = (None, 3, 1.5, b"m", ["m"], "", "a\0b", "\ud800")


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
def test_paths_that_are_none(path, small):
    for call in (
        lambda: jsparse.load(path),
        lambda: jsparse.save(small, path),
        lambda: convert.from_huggingface(path),
        lambda: convert.to_huggingface(small, path),
        lambda: convert.import_predictors(path, TINY),
    ):
        with pytest.raises(jsparse.JsparseError, match=r"must be a path|is no path"):
            call()


def test_names_that_are_too_long(small, tmp_path):
    for call in (lambda path: jsparse.save(small, path), jsparse.load):
        with pytest.raises(jsparse.JsparseError, match=r"(?i)file name too long"):
            call(tmp_path / ("a" * 300))


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(mask, small, tmp_path):
    before = os.umask(mask)
    try:
        convert.to_huggingface(small, tmp_path / "o")
        jsparse.save(small, tmp_path / "s")
    finally:
        os.umask(before)
    for root in (tmp_path / "o", tmp_path / "s"):
        for path in (root, *root.rglob("*")):
            expected = (0o777 if path.is_dir() else 0o666) & ~mask
            assert path.stat().st_mode & 0o777 == expected, path


LOAD = "import sys, jsparse\ntry: jsparse.load(sys.argv[1])\nexcept jsparse.JsparseError as error: print(error)"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every layout, with what each calls its files."""
    root = tmp_path_factory.mktemp("layouts")
    tensors = random_tensors(LLAMA)
    made = {files: write(root / files, LLAMA, tensors, files) for files in ("safetensors", "safetensors-shards", "bin")}
    (made["safetensors"] / "tokenizer.json").write_text("{}")
    jsparse.save(random_params(TINY), root / "own")
    return made | {"own": root / "own"}


UNREADABLE = {
    "config": ("safetensors", "config.json", "config.json cannot be read: Permission denied"),
    "weights": ("safetensors", "model.safetensors", "model.safetensors cannot be read: Permission denied"),
    "a shard": (
        "safetensors-shards",
        "model-00002-of-00003.safetensors",
        "model-00002-of-00003.safetensors cannot be read: Permission denied",
    ),
    "the index": ("safetensors-shards", "model.safetensors.index.json", "index.json cannot be read: Permission denied"),
    "a PyTorch file": ("bin", "pytorch_model.bin", "pytorch_model.bin cannot be read: Permission denied"),
    "tokenizer": ("safetensors", "tokenizer.json", "tokenizer.json cannot be read: Permission denied"),
    "the directory": ("safetensors", ".", "permission denied"),
    "a model's description": ("own", "jsparse.json", "jsparse.json: cannot be read"),
    "a model's directory": ("own", ".", "permission denied"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_may_not_be_read_is_said_to_be_that(name, checkpoints):
    layout, file, said = UNREADABLE[name]
    path = checkpoints[layout] / file
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        done = run(["-c", LOAD, str(checkpoints[layout])])
    finally:
        path.chmod(mode)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert "exist" not in done.stdout
    assert "No such file" not in done.stdout


def test_a_folder_that_may_not_be_written(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    calls = {
        "jsparse.save(params, path)": "cannot be written: Permission denied",
        "convert.to_huggingface(params, path)": "cannot be written: Permission denied",
    }
    for call, said in calls.items():
        code = f"import sys, jsparse, convert\nparams, path = jsparse.load('default'), sys.argv[1]\ntry: {call}\n"
        code += "except jsparse.JsparseError as error: print(error)"
        done = run(["-c", code, str(folder / "m")])
        assert said in done.stdout, done.stderr
        assert not any(folder.iterdir())
    done = run(["-m", "convert", "default", str(folder / "m")])
    assert done.returncode == 2
    assert "is not writable" in done.stderr


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_a_cache_that_may_not_be_written(variable, tmp_path):
    tmp_path.chmod(0o555)
    environment = {**os.environ, variable: str(tmp_path)}
    done = run(["-m", "jsparse", "generate", "default", "a = ", "--max-new-tokens", "3"], env=environment)
    tmp_path.chmod(0o755)
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("executor: xla")]
    assert lines[-1].startswith("[2 tokens decoded")
    named = [f"compiled programs are not kept: JAX_COMPILATION_CACHE_DIR is {tmp_path}: Permission denied"]
    assert lines[:-1] == (named if variable.startswith("JAX") else [])
    assert not any(tmp_path.iterdir())


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 134767\n"
)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("safetensors", "model.safetensors"),
        ("safetensors-shards", "model-00001-of-00003.safetensors"),
        ("safetensors-shards", "model.safetensors.index.json"),
        ("bin", "pytorch_model.bin"),
        ("safetensors", "config.json"),
        ("safetensors", "tokenizer.json"),
        ("safetensors", "tokenizer.model"),
        ("safetensors", "tokenizer_config.json"),
    ],
)
def test_pointers_of_git_lfs_are_named(layout, file, tmp_path):
    directory = write(tmp_path / "m", LLAMA, random_tensors(LLAMA), layout)
    if file == "tokenizer_config.json":
        (directory / "tokenizer.json").write_text("{}")
    (directory / file).write_text(POINTER)
    with pytest.raises(jsparse.JsparseError, match=rf"{file} is a git-lfs pointer.*git lfs pull"):
        jsparse.load(directory)


def test_predictors_are_read_back_after_an_export(tiny_fitted, tmp_path, monkeypatch):
    import torch

    right = torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: right({k: v * jnp.nan for k, v in state.items()}, path))
    with pytest.raises((jsparse.JsparseError, TypeError)):
        convert.export_predictors(tiny_fitted, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_reader_that_stops_reading_ends_a_command_quietly():
    command = (
        f"PYTHONUNBUFFERED=1 {sys.executable} -m jsparse generate default 'import os' --max-new-tokens 200 | head -c 5"
    )
    done = subprocess.run(["bash", "-c", command + "; exit ${PIPESTATUS[0]}"], capture_output=True, text=True)
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 141
