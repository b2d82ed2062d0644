"""The benchmarks run: what they print is for the log, that they still work is for a test."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "ffn": ["--shape", "MiniCPM-1B", "--rounds", "1"],
    "decode": ["--shape", "MiniCPM-1B", "--layers", "1", "--rounds", "1", "--kv-dtype", "int8", "--others"],
    "cuda_ffn": ["--interpret", "--rounds", "1", "--dtype", "float16", "int4"],
    "cuda_decode": ["--interpret", "--rounds", "1", "--dtype", "float16", "int4", "--kv-dtype", "int8"],
}


QUALITY = {
    "rounding": ["--rounding", "int4:32", "int4:32, down in groups of neurons", "int8", "Q4_K_M"],
    "kv_cache": [],
    "predictors": ["--seeds", "1", "--rank", "16"],
}


def run(name: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.nightly
@pytest.mark.parametrize("name", QUALITY)
def test_quality_benchmarks_run(name):
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    options = [option for option in QUALITY[name] if option != "Q4_K_M" or has_llama_cpp]
    done = run(name, *options, "--tokens", "512", "--window", "128")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert all(0 <= row["kl"] < 0.2 for row in rows)
    if name == "rounding":
        kl = {row["rounding"]: row["kl"] for row in rows}
        assert kl["int8"] < kl["int4:32"] < kl["Q4_0"]


def test_a_quality_benchmark_says_what_it_cannot_read(tmp_path):
    for options in ([str(tmp_path)], ["--window", "1"]):
        done = run("kv_cache", *options)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_speed_benchmarks_run(name):
    done = run(name, *COMMANDS[name])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["mode"] for row in rows} == {"dense", "sparse"}
    assert all(row["ms"] > 0 for row in rows)
