"""Who may import whom, as the design has it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"pallas_kernels", "cpu_kernels", "cann_bridge"}
PACKAGES = LEAVES | {"jsparse", "convert", "tests", "benchmarks"}
ADAPTERS = {
    "jsparse/executors/cpu.py": "cpu_kernels",
    "jsparse/executors/cuda.py": "pallas_kernels",
    "jsparse/executors/npu.py": "cann_bridge",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Top-level package of every import in a file, and whether it happens when the file is imported."""
    tree = ast.parse(path.read_text())
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        found += [(name.split(".")[0], id(node) not in inside_functions) for name in names]
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(LEAVES))
def test_leaves_know_arrays_only(package):
    for path in files(package):
        used = {name for name, _ in imports(path)} & PACKAGES
        assert used <= {package}, f"{path} imports {used}"


def test_jsparse_reaches_the_leaves_in_their_adapters_only_and_convert_lazily():
    assert len(files("jsparse")) > 10
    for path in files("jsparse"):
        relative = path.relative_to(ROOT).as_posix()
        for name, at_import in imports(path):
            assert name not in {"tests", "benchmarks"}, f"{relative} imports {name}"
            if name in LEAVES:
                assert ADAPTERS.get(relative) == name, f"{relative} imports {name}"
            if name in LEAVES | {"convert"}:
                assert not at_import, f"{relative} imports {name} at import time"
            if name == "convert":
                assert relative == "jsparse/checkpoints/open.py", f"{relative} imports convert"


def test_core_modules_do_not_import_heavy_libraries_at_import_time():
    heavy = {"torch", "torch_npu", "transformers", "matplotlib", "orbax", "cupy"}
    for path in files("jsparse") + files("convert"):
        for name, at_import in imports(path):
            assert not (at_import and name in heavy), f"{path} imports {name} at import time"


def test_nobody_imports_tests_or_benchmarks():
    for path in files("convert"):
        assert not {name for name, _ in imports(path)} & {"tests", "benchmarks"}, path


def test_modules_are_small():
    for package in PACKAGES:
        for path in files(package):
            if package != "tests":
                assert len(path.read_text().splitlines()) <= 400, f"{path} has grown past 400 lines"
