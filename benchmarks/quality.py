"""What sparsity costs the shipped model: `python -m benchmarks.quality [--no-grid] [--dtype int8]`.

Every row is measured on the deployed path: the executor's `sparse_ffn` on every held-out token, and free generation
of arithmetic solutions.
"""

import argparse
import dataclasses
import json

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse
from benchmarks.held_out import divergence
from jsparse.arrays import DTYPES
from jsparse.evaluation.scoring import held_out_rows, read_lines, teacher_forced
from jsparse.executors.select import select_executor
from jsparse.predictors.options import CalibrationOptions
from jsparse.predictors.texts import default_texts

SPARSITIES = (0.5, 0.7, 0.85, 0.95)
RANK_SHARES = (16, 8, 4)
BITS = (16, 8, 4)
BATCH = 100


def arithmetic_exact_match(params: jsparse.Params, problems: list[dict], sparse: bool) -> float:
    """Share of problems whose freely generated solution ends in the right answer."""
    right = 0
    problems = sorted(problems, key=lambda problem: len(problem["prompt"]))  # rows of a batch end together
    for start in range(0, len(problems), BATCH):
        batch = problems[start : start + BATCH]
        prompts = [problem["prompt"] for problem in batch]
        texts = jsparse.generate(params, prompts, max_new_tokens=80, stop="\n\n", sparse=sparse)
        right += sum(text.splitlines()[-1:] == [f"answer {p['answer']}"] for text, p in zip(texts, batch))
    return right / len(problems)


def measure(params: jsparse.Params, rows: np.ndarray, problems: list[dict], reference: list | None) -> dict:
    """One row of the table; `reference` holds the dense log-probabilities, or is None for the dense model itself."""
    executor = select_executor()
    hits = kl = loss = 0.0
    counts = np.zeros((params.config.num_layers, 3))
    kept = []
    for number, row in enumerate(rows):
        log_p, row_counts = teacher_forced(params.weights, params.predictors, row, params.config, executor)
        log_p, targets = np.asarray(log_p)[:-1], row[1:]
        hits += np.mean(log_p.argmax(-1) == targets)
        loss -= np.mean(log_p[np.arange(targets.size), targets])
        if reference is None:
            kept.append(log_p)
        else:
            kl += divergence(reference[number], log_p)
        counts += row_counts
    predicted, caught, active = counts.sum(axis=0)
    pairs = rows.size * params.config.num_layers * params.config.intermediate_size
    return {
        "accuracy": hits / len(rows),
        "loss": loss / len(rows),
        "kl": kl / len(rows),
        "recall": caught / active,
        "skipped": 1 - predicted / pairs if params.predictors else 0.0,
        "sparsity": 1 - active / pairs,
        "arithmetic": arithmetic_exact_match(params, problems, params.predictors is not None),
        "log_p": kept,
    }


def configurations(hidden_size: int, sparsities: list[float], grid: bool) -> list[tuple[str, CalibrationOptions]]:
    """Our recipe over the grid, and the paper's at 16 bits: with its early stop, and at the same skip share as ours.

    Without `grid`, the paper's without its early stop at the last sparsity, and our default.
    """
    ours = [
        ("ours", CalibrationOptions(rank=hidden_size // share, bits=bits, sparsity=s))
        for s in sparsities
        for share in RANK_SHARES
        for bits in BITS
    ]
    paper = [
        (name, dataclasses.replace(CalibrationOptions.paper(hidden_size // 16, s), silenced=rule))
        for name, rule in (("paper, early stop", "stop"), ("paper", "spare"))
        for s in sparsities
    ]
    if not grid:
        return [paper[-1], ("ours", CalibrationOptions())]
    return [*paper, *ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two configurations on a part of the data")
    parser.add_argument("--no-grid", dest="grid", action="store_false", help="two configurations on all of the data")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES, help="rows of the table to measure")
    parser.add_argument("--model", default="default", help="a checkpoint with the shipped model's tokenizer")
    args = parser.parse_args()
    params = jsparse.load(args.model, dtype=args.dtype)
    rows = held_out_rows(params, 8 if args.quick else 40)
    problems = read_lines("held_out_arithmetic.jsonl")[: 50 if args.quick else 500]
    texts = default_texts("default")

    dense = measure(params, rows, problems, None)
    log_p = dense.pop("log_p")
    results = [{"recipe": "dense", **dense}]
    grid = configurations(params.config.hidden_size, args.sparsity, args.grid and not args.quick)
    for recipe, options in track(grid, "measuring", console=Console(stderr=True)):
        fitted = jsparse.fit_predictors(params, texts, **dataclasses.asdict(options))
        row = measure(fitted, rows, problems, log_p)
        row.pop("log_p")
        size = sum(leaf.nbytes for p in fitted.predictors for leaf in jax.tree.leaves((p.a, p.b)))
        setting = {
            "rank": fitted.predictors[0].rank,
            "bits": options.bits,
            "s": options.sparsity,
            "kilobytes": size / 1e3,
        }
        results.append({"recipe": recipe, **setting, **row})

    table = Table(title=f"{rows.size:,} held-out tokens of code, {len(problems)} arithmetic problems")
    names = ("recipe", "s", "rank", "bits", "kilobytes", "accuracy", "change", "kl", "recall", "skipped", "arithmetic")
    for name in names:
        table.add_column(name, justify="right")
    for row in results:
        row["change"] = row["accuracy"] / dense["accuracy"] - 1
        cells = {**{name: "" for name in names}, **row}
        for name, form in (
            ("accuracy", ".4f"),
            ("change", "+.2%"),
            ("kl", ".5f"),
            ("recall", ".2%"),
            ("skipped", ".1%"),
            ("arithmetic", ".1%"),
        ):
            cells[name] = format(cells[name], form)
        cells["kilobytes"] = f"{row['kilobytes']:.0f}" if "kilobytes" in row else ""
        table.add_row(*(str(cells[name]) for name in names))
    Console(width=130).print(table)
    print(json.dumps(results, default=float))


if __name__ == "__main__":
    main()
