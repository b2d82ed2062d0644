"""The speed benchmarks run: what they print is for the log, that they still work is for a test."""

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


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_speed_benchmarks_run(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", *COMMANDS[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["mode"] for row in rows} == {"dense", "sparse"}
    assert all(row["ms"] > 0 for row in rows)
