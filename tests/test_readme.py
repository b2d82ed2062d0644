"""Every snippet of the README runs, in order, in one directory."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_python_snippets(directory, monkeypatch):
    monkeypatch.chdir(directory)
    found = snippets("python")
    assert len(found) == 2
    names: dict = {}
    for code in found:
        exec(code, names)
    assert all(isinstance(answer, str) for answer in names["answers"])
    assert (directory / "model-with-predictors" / "jsparse.json").is_file()


def test_shell_snippets(directory):
    make, commands = (block.strip().splitlines() for block in snippets("sh"))
    targets = [line.split()[1] for line in make]
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for line in commands:
        command = re.sub(r"^python ", f"{sys.executable} ", line)
        done = subprocess.run(command, shell=True, cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (directory / "checkpoint" / "model.safetensors").is_file()
    assert (directory / "predictors" / "model_0.pt").is_file()
    assert (directory / "model" / "jsparse.json").is_file()


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
