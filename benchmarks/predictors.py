"""What sparsity costs on rounded weights: `python -m benchmarks.predictors [MODEL] [--dtype bfloat16 int4]`.

KL(dense || sparse) of the next token on text that was not calibrated on, in nats per token, both sides with weights
of the same storage: predictors are fitted to the weights as they are stored, several times with other seeds of the
calibration. Through the CPU executor where it runs.
"""

import dataclasses

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse
from benchmarks.held_out import divergence, model_and_rows, parser
from benchmarks.report import interval, positive, print_json
from jsparse.arrays import DTYPES
from jsparse.evaluation.scoring import teacher_forced
from jsparse.executors.select import select_executor
from jsparse.predictors.options import CalibrationOptions
from jsparse.predictors.texts import default_texts


def compare(params: jsparse.Params, rows: np.ndarray) -> dict:
    """Measure KL(dense || sparse), the mean over the rows, and what the predictors caught and skipped."""
    executor, config, found = select_executor(), params.config, []
    counts = np.zeros(3)
    for row in rows:
        exact, _ = teacher_forced(params.weights, None, row, config, executor)
        log_p, row_counts = teacher_forced(params.weights, params.predictors, row, config, executor)
        found.append(divergence(np.asarray(exact), np.asarray(log_p)))
        counts += np.asarray(row_counts).sum(axis=0)
    predicted, caught, active = counts
    return {
        "kl": float(np.mean(found)),
        "interval": interval(found),
        "recall": caught / active,
        "skipped": 1 - predicted / (rows.size * config.num_layers * config.intermediate_size),
    }


def measure(model: str, dtypes: list[str], fits: list[CalibrationOptions], rows: np.ndarray) -> list[dict]:
    """Fit and compare in every storage: an entry for each fit."""
    texts, results = default_texts(model), []
    for dtype in dtypes:
        params = jsparse.load(model, dtype=dtype)
        for options in track(fits, f"Fits in {dtype}", console=Console(stderr=True)):
            fitted = jsparse.fit_predictors(params, texts, **dataclasses.asdict(options))
            setting = {"dtype": dtype, "rank": fitted.predictors[0].rank, "bits": options.bits}
            setting |= {"sparsity": options.sparsity, "seed": options.seed}
            sizes = {
                "predictor_bytes": sum(leaf.nbytes for p in fitted.predictors for leaf in jax.tree.leaves((p.a, p.b))),
                "matrix_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights.layers)),
            }
            results.append(setting | compare(fitted, rows) | sizes)
    return results


def main() -> None:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "int4"], help="of the weights")
    command.add_argument("--rank", type=positive, nargs="+", help="default: a quarter of the hidden size")
    command.add_argument("--sparsity", type=float, default=CalibrationOptions().sparsity, help="default %(default)s")
    command.add_argument("--seeds", type=positive, default=3, help="calibrations, default %(default)s")
    args = command.parse_args()
    if args.model != "default":
        command.error(f"{args.model} comes without calibration text, which only the shipped model, default, has")
    exact, rows = model_and_rows(command, args)
    fits = [
        CalibrationOptions(rank=rank, sparsity=args.sparsity, seed=seed)
        for rank in args.rank or [None]
        for seed in range(args.seeds)
    ]
    try:
        for options in fits:
            options.check(exact.config)
    except jsparse.JsparseError as error:
        command.error(str(error))
    results = measure(args.model, [*dict.fromkeys(args.dtype)], fits, rows)
    table = Table(
        title=f"{exact.config.name}: {rows.size:,} tokens, KL(dense || sparse) in nats per token, the mean "
        f"over calibrations with {args.seeds} seeds"
    )
    columns = ("weights", "rank", "KL", "over the first", "recall", "skipped", "predictors, kB", "layers, kB")
    for column in columns:
        table.add_column(column, justify="right")
    groups = [results[start : start + args.seeds] for start in range(0, len(results), args.seeds)]
    means = [{key: np.mean([r[key] for r in group]) for key in ("kl", "recall", "skipped")} for group in groups]
    for group, mean in zip(groups, means):
        cells = [group[0]["dtype"], group[0]["rank"], f"{mean['kl']:.5f}", f"{mean['kl'] / means[0]['kl']:.2f}"]
        cells += [f"{mean['recall']:.1%}", f"{mean['skipped']:.1%}"]
        cells += [f"{group[0][key] / 1e3:.0f}" for key in ("predictor_bytes", "matrix_bytes")]
        table.add_row(*map(str, cells))
    Console(width=130).print(table)
    print_json(results)


if __name__ == "__main__":
    main()
