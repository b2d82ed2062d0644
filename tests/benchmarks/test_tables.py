"""Tables in documents are those of benchmarks/results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(repository: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.tables"]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path) -> Path:
    """The documents, results and the script, in a place of their own."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.json")):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for name in ("__init__.py", "tables.py"):
        (tmp_path / "benchmarks" / name).write_bytes((ROOT / "benchmarks" / name).read_bytes())
    return tmp_path


def test_every_table_is_drawn_from_its_results(repository):
    done = run(repository)
    assert (done.returncode, done.stdout) == (0, ""), "run python -m benchmarks.tables"
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"<!-- table: {path.stem}" in text, f"{path.name} is shown nowhere"
        assert json.loads(path.read_text()).keys() == {"date", "hardware", "command", "columns", "rows"}


def test_a_changed_figure_is_drawn_again(repository):
    path = repository / "benchmarks" / "results" / "fit-time.json"
    path.write_text(path.read_text().replace('"13.2"', '"99.9"'))
    assert run(repository).stdout == "docs/log.md: drawn again\n"
    assert "| `fit_svd` | 99.9 |" in (repository / "docs" / "log.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"seconds"]', '"step"]', "fit-time.json names two columns alike"),
        ('"seconds"]', '"seconds", "more"]', "fit-time.json has rows of another length than its 3 columns"),
    ],
)
def test_broken_results_are_named(repository, old, new, said):
    path = repository / "benchmarks" / "results" / "fit-time.json"
    path.write_text(path.read_text().replace(old, new))
    assert said in run(repository).stderr


def test_a_column_that_is_not_there_is_named(repository):
    document = repository / "docs" / "log.md"
    document.write_text(document.read_text().replace("<!-- table: fit-time -->", "<!-- table: fit-time: minutes -->"))
    assert "fit-time.json has no column 'minutes'; it has step, seconds" in run(repository).stderr
