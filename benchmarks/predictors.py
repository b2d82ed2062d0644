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
from benchmarks.held_out import model_and_rows, parser
from benchmarks.report import interval, positive, print_json
from jsparse.arrays import DTYPES
from jsparse.evaluation.scoring import teacher_forced
from jsparse.executors.select import select_executor
from jsparse.predictors.options import CalibrationOptions
from jsparse.predictors.texts import default_texts


def divergence(params: jsparse.Params, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(dense || sparse) of every row, the mean over its tokens; neurons predicted, caught and active of all."""
    executor, found = select_executor(), []
    counts = np.zeros(3)
    for row in rows:
        exact = np.asarray(teacher_forced(params.weights, None, row, params.config, executor)[0])
        log_p, row_counts = teacher_forced(params.weights, params.predictors, row, params.config, executor)
        found.append(np.sum(np.exp(exact) * (exact - np.asarray(log_p)), axis=-1).mean())
        counts += np.asarray(row_counts).sum(axis=0)
    return np.asarray(found), counts


def main() -> None:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "int4"], help="of the weights")
    command.add_argument("--rank", type=positive, nargs="+", help="default: a quarter of the hidden size")
    command.add_argument("--sparsity", type=float, default=CalibrationOptions().sparsity, help="default %(default)s")
    command.add_argument("--seeds", type=positive, default=3, help="calibrations, default %(default)s")
    args = command.parse_args()
    exact, rows = model_and_rows(command, args)
    if args.model != "default":
        command.error(f"{args.model} comes without calibration text, which only the shipped model, default, has")
    texts = default_texts("default")
    for rank in args.rank or [None]:
        try:
            CalibrationOptions(rank=rank, sparsity=args.sparsity).check(exact.config)
        except jsparse.JsparseError as error:
            command.error(str(error))
    settings = [(dtype, rank) for rank in args.rank or [None] for dtype in dict.fromkeys(args.dtype)]
    results = []
    for (dtype, rank), seed in track(
        [(setting, seed) for setting in settings for seed in range(args.seeds)], "Fits", console=Console(stderr=True)
    ):
        options = CalibrationOptions(rank=rank, sparsity=args.sparsity, seed=seed)
        params = jsparse.fit_predictors(jsparse.load(args.model, dtype=dtype), texts, **dataclasses.asdict(options))
        kl, (predicted, caught, active) = divergence(params, rows)
        results.append(
            {
                "dtype": dtype,
                "rank": params.predictors[0].rank,
                "bits": options.bits,
                "sparsity": options.sparsity,
                "seed": seed,
                "kl": float(kl.mean()),
                "interval": interval(kl),
                "recall": caught / active,
                "skipped": 1 - predicted / (rows.size * params.config.num_layers * params.config.intermediate_size),
                "predictor_bytes": sum(leaf.nbytes for p in params.predictors for leaf in jax.tree.leaves((p.a, p.b))),
                "matrix_bytes": sum(leaf.nbytes for layer in params.weights.layers for leaf in jax.tree.leaves(layer)),
            }
        )
    table = Table(
        title=f"{exact.config.name}: {rows.size:,} tokens, KL(dense || sparse) in nats per token, the mean "
        f"over calibrations with {args.seeds} seeds"
    )
    columns = ("weights", "rank", "KL", "over the first", "recall", "skipped", "predictors, kB", "layers, kB")
    for column in columns:
        table.add_column(column, justify="right")
    for start in range(0, len(results), args.seeds):
        group = results[start : start + args.seeds]
        mean = {key: np.mean([entry[key] for entry in group]) for key in ("kl", "recall", "skipped")}
        first = np.mean([entry["kl"] for entry in results[: args.seeds]])
        cells = [group[0]["dtype"], group[0]["rank"], f"{mean['kl']:.5f}", f"{mean['kl'] / first:.2f}"]
        cells += [f"{mean['recall']:.1%}", f"{mean['skipped']:.1%}"]
        cells += [f"{group[0][key] / 1e3:.0f}" for key in ("predictor_bytes", "matrix_bytes")]
        table.add_row(*map(str, cells))
    Console(width=130).print(table)
    print_json(results)


if __name__ == "__main__":
    main()
