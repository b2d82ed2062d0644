"""Draws the tables of docs and README from the figures in benchmarks/results, so that no figure stands in two places.

A file `results/NAME.json` has `columns`, `rows`, and what they were measured with: `date`, `hardware`, `command`. In a
document the table stands between `<!-- table: NAME -->` and `<!-- end -->`, or some of its columns, where these are
named: `<!-- table: NAME: first, second -->`.
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- table: ([\w-]+)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """What may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def markdown(name: str, columns: list[str] | None = None) -> str:
    """The table of a result, or some of its columns.

    Raises:
      ValueError: it has no such column, two of one name, or a row of another length than the columns.
    """
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    every = result["columns"]
    columns = columns or every
    if unknown := [column for column in columns if column not in every]:
        raise ValueError(f"results/{name}.json has no column {unknown[0]!r}; it has {', '.join(every)}")
    if len({*every}) != len(every):
        raise ValueError(f"results/{name}.json names two columns alike")
    if any(len(row) != len(every) for row in result["rows"]):
        raise ValueError(f"results/{name}.json has rows of another length than its {len(every)} columns")
    places = [every.index(column) for column in columns]
    rows = [columns, *([row[i] for i in places] for row in result["rows"])]
    lines = [f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows]
    return "".join([lines[0], f"|{'---|' * len(columns)}\n", *lines[1:]])


def drawn(text: str) -> str:
    """The document with its tables as the results are now."""

    def table(match: re.Match) -> str:
        columns = match[3] and [column.strip() for column in match[3].split(",")]
        return match[1] + markdown(match[2], columns) + match[4]

    return _TABLE.sub(table, text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (new := drawn(text)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: drawn again")


if __name__ == "__main__":
    main()
