"""The commands as processes: what they print, and the programs that they keep compiled."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, random_params

import jsparse
from jsparse.cli.info import describe_model
from jsparse.cli.main import main

ROOT = Path(__file__).parents[2]


def generate(cache, *options: str, variable: str = "XDG_CACHE_HOME") -> subprocess.CompletedProcess:
    environment = {**os.environ, variable: str(cache)}
    command = [sys.executable, "-m", "jsparse", "generate", "default", ">>> 37 + 58 - 12\n", "--max-new-tokens", "30"]
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(("variable", "folder"), [("XDG_CACHE_HOME", "jsparse"), ("JAX_COMPILATION_CACHE_DIR", ".")])
def test_generate_keeps_what_it_compiled(variable, folder, tmp_path):
    first = generate(tmp_path, variable=variable)
    kept = {path.name for path in (tmp_path / folder).glob("*-cache")}
    again = generate(tmp_path, variable=variable)
    assert first.stdout == again.stdout
    assert first.stdout.startswith("37 + 58 = 95\n95 - 12 = 83\nanswer 83\n")
    assert re.search(r"\[29 tokens decoded, [\d.]+ tokens/s", again.stderr)
    assert any("step_chunk" in name for name in kept)
    assert {path.name for path in (tmp_path / folder).glob("*-cache")} == kept


def test_a_platform_that_is_not_there():
    environment = {**os.environ, "JAX_PLATFORMS": "rocm"}
    command = [sys.executable, "-m", "jsparse", "generate", "default", "a"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX finds no device of JAX_PLATFORMS=rocm: ")
    assert "Traceback" not in done.stderr


def test_generate_without_a_place_to_keep_it():
    done = generate("/dev/null", "--temperature", "0.5")
    assert done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("executor: xla")]
    assert len(lines) == 2, done.stderr  # the end of the text's line, and the statistics


def test_the_gpu_tests_without_a_gpu_are_no_success():
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/pallas_kernels/test_pallas_kernels.py"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert re.search(r"^no test ran: .*CUDA device", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(("bits", "said"), [(16, "16 bits"), (8, "8 bits"), (4, "4 bits")])
def test_info_names_the_bits_of_the_predictors(bits, said, tiny, tiny_tokens):
    fitted = jsparse.fit_predictors(tiny, tiny_tokens, rank=16, bits=bits)
    assert f"rank 16, {said}, " in describe_model(fitted)["predictors"]


@pytest.mark.parametrize(
    ("slides", "said"), [(None, ", sliding window 40"), ((True, False, True), ", sliding window 40 in 2 of 3 layers")]
)
def test_info_says_which_layers_have_a_window(slides, said):
    config = dataclasses.replace(TINY, sliding_window=40, slides=slides)
    assert describe_model(random_params(config))["attention"] == f"4 heads, 2 key/value heads of 16{said}"
    assert "window" not in describe_model(random_params(TINY))["attention"]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"jsparse {jsparse.__version__}\n"
