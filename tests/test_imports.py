"""Who may import whom, as the design has it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ("errors", "typing", "directories", "options", "settings", "text"),
    ("arrays",),
    ("rounding",),
    ("model",),
    ("executors", "checkpoints"),
    ("predictors",),
    ("decoding",),
    ("evaluation",),
    ("api",),
    ("serving",),
    ("cli",),
    ("__init__", "__main__", "calibrate"),
)
"""The parts of jsparse: each imports from its own line and the lines above, and none from a folder beside it."""
FOLDERS = {"text", "model", "executors", "checkpoints", "predictors", "decoding", "evaluation", "serving", "cli"}
LEAVES = {"pallas_kernels", "cpu_kernels", "cann_bridge"}
PACKAGES = LEAVES | {"jsparse", "convert", "benchmarks"}
HEAVY = {"torch", "torch_npu", "transformers", "matplotlib", "orbax", "cupy"}
LONGEST = 350
"""Lines of a module."""


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for package in PACKAGES for path in files(package)}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether it does when it is itself imported."""
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
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in names]
        found += [(name, id(node) not in inside_functions) for name in names]
    return found


def layer_of(module: str) -> int:
    part = [*module.split("."), "__init__"][1]
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


def test_every_part_imports_from_the_layers_below_it():
    assert len(files("jsparse")) > 30
    for path in files("jsparse"):
        module = module_of(path)
        for name, _ in imports(path):
            if name.split(".")[0] != "jsparse" or name == "jsparse":
                continue
            own, other = layer_of(module), layer_of(name)
            assert other <= own, f"{module} imports {name}, which lies above it"
            beside = other == own and own > 0 and own < len(LAYERS) - 1
            assert not beside or module.split(".")[1] == name.split(".")[1], f"{module} imports {name} beside it"


def test_no_modules_import_one_another_in_a_circle():
    graph = {module: {name for name, _ in imports(path) if name in MODULES} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("package", sorted(LEAVES))
def test_leaves_know_arrays_only(package):
    for path in files(package):
        used = {name.split(".")[0] for name, _ in imports(path)} & (PACKAGES | {"tests"})
        assert used <= {package}, f"{path} imports {used}"


def test_only_executors_reach_the_leaves_and_only_open_calls_convert():
    for path in files("jsparse"):
        module = module_of(path)
        for name, at_import in imports(path):
            package = name.split(".")[0]
            assert package not in {"tests", "benchmarks"}, f"{module} imports {name}"
            if package in LEAVES:
                assert module.startswith("jsparse.executors."), f"{module} imports {name}"
            if package == "convert":
                assert (module, name) == ("jsparse.checkpoints.open", "convert"), f"{module} imports {name}"
            if package in LEAVES | {"convert"}:
                assert not at_import, f"{module} imports {name} at import time"


def test_convert_knows_what_lies_below_executors():
    for path in files("convert"):
        module, most = module_of(path), layer_of("jsparse.model")
        for name, _ in imports(path):
            assert name.split(".")[0] not in {"tests", "benchmarks"}, f"{module} imports {name}"
            if name.startswith("jsparse.") and module != "convert.__main__":
                assert layer_of(name) <= most, f"{module} imports {name}"


def test_tests_do_not_import_benchmarks():
    for path in files("tests"):
        assert not {name for name, _ in imports(path) if name.split(".")[0] == "benchmarks"}, path


def test_core_modules_do_not_import_heavy_libraries_at_import_time():
    for path in files("jsparse") + files("convert"):
        for name, at_import in imports(path):
            assert not (at_import and name.split(".")[0] in HEAVY), f"{path} imports {name} at import time"


def test_folders_are_those_of_the_design_and_say_what_belongs_in_them():
    folders = {path.parent.name for path in files("jsparse") if path.parent != ROOT / "jsparse"}
    assert folders <= FOLDERS
    for path in MODULES.values():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} does not say what belongs in it"


def test_folders_of_tests_have_the_names_of_what_they_test():
    folders = {path.parent.name for path in files("tests") if path.name.startswith("test_")}
    assert folders <= FOLDERS | PACKAGES | {"tests"}


def test_modules_are_small():
    for path in MODULES.values():
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST, f"{path} has {lines} lines, more than {LONGEST}"
