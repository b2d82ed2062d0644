"""The native code's own tests, built with sanitizers: every instruction set, exact buffers, several threads."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "cpu_kernels" / "native"
SOURCES = [
    *(NATIVE / f"{name}.cc" for name in ("attention", "check", "kernels", "ops", "parallel")),
    *sorted(NATIVE.glob("kernels_*.cc")),
    ROOT / "tests" / "native" / "test_ops.cc",
]
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=fast", "-Wno-psabi", "-pthread"]


def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_headers_compile_alone(tmp_path):
    for header in sorted(NATIVE.glob("*.h")):
        source = tmp_path / "alone.cc"
        source.write_text(f'#include "{header}"\n')
        command = [compiler(), "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("sanitizers", "left_out"),
    [
        ("address,undefined", ["kernels_avx2", "kernels_avx512"]),  # the source of the other two
        pytest.param("address,undefined", [], marks=pytest.mark.nightly),
        pytest.param("thread", [], marks=pytest.mark.nightly),
    ],
)
def test_native_operations(sanitizers, left_out, tmp_path):
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    objects = [tmp_path / f"{source.stem}.o" for source in SOURCES]
    running = []
    for source, target in zip(SOURCES, objects):
        command = [compiler(), *FLAGS, *([] if source.stem in left_out else sanitize), "-c", source, "-o", target]
        running.append(subprocess.Popen([*command, f"-I{NATIVE}"], stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    program = tmp_path / "test_ops"
    subprocess.run([compiler(), "-pthread", *sanitize, *objects, "-o", program], check=True)
    sets = ("avx512vnni", "avx512", "avx2", "baseline")
    running = [
        subprocess.Popen([program, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for name in sets
    ]
    for name, process in zip(sets, running):
        printed, _ = process.communicate()
        assert process.returncode == 0, printed[-8000:]
        assert f"{name}: done" in printed or name != "baseline"
