"""The native code's own tests, built with sanitizers: every instruction set, exact buffers, several threads."""

import shutil
import subprocess
from pathlib import Path

import pytest

import cpu_kernels

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "cpu_kernels" / "native"
SOURCES = [
    *(NATIVE / f"{name}.cc" for name in ("attention", "check", "kernels", "ops", "parallel")),
    *sorted(NATIVE.glob("kernels_*.cc")),
    ROOT / "tests" / "cpu_kernels" / "test_ops.cc",
]
INSTRUCTION_SETS = ("avx512vnni", "avx512", "avx2", "baseline")
FLAGS = ["-std=c++17", "-g1", "-ffp-contract=fast", "-Wno-psabi", "-pthread"]


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
    ("sanitizers", "every"),
    [
        ("address,undefined", False),
        pytest.param("address,undefined", True, marks=pytest.mark.nightly),
        pytest.param("thread", True, marks=pytest.mark.nightly),
    ],
)
def test_native_operations(sanitizers, every, tmp_path):
    """With the instruction set that this processor is given, not optimised, which compiles in a third of the time; or
    with every one, optimised. All have the same source."""
    sets = INSTRUCTION_SETS if every or cpu_kernels.unavailable() else [cpu_kernels.instruction_set()]
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    objects = [tmp_path / f"{source.stem}.o" for source in SOURCES]
    running = []
    for source, target in zip(SOURCES, objects):
        name = source.stem.removeprefix("kernels_")
        flags = [] if name in INSTRUCTION_SETS and name not in sets else sanitize
        command = [compiler(), *FLAGS, "-O1" if every else "-O0", *flags, "-c", source, "-o", target, f"-I{NATIVE}"]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    program = tmp_path / "test_ops"
    subprocess.run([compiler(), "-pthread", *sanitize, *objects, "-o", program], check=True)
    running = [
        subprocess.Popen([program, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for name in sets
    ]
    for name, process in zip(sets, running):
        printed, _ = process.communicate()
        assert process.returncode == 0, printed[-8000:]
        assert f"{name}: done" in printed or (every and name != "baseline"), printed
