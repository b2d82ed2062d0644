"""A pass over several tokens, one FFN layer on a CPU: `python -m benchmarks.passes [--dtype int8 int4]`.

Dense, for 1 to 16 tokens, against the larger of what reading the weights takes at the probe's bandwidth and what the
multiply-adds take at the kernels' own peak. This is the best rate of any pass, also over the first neurons of the same
layer, so few that they stay in a cache; unpacking and scales are thus part of it. Layers are rotated, so that no weight
is in a cache when its turn comes, and the passes take turns.
"""

import argparse
import statistics
from functools import partial

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import random_models
from benchmarks.report import cpu_probe, positive, print_json, processor
from benchmarks.rotation import nbytes, one_after_another, rotated
from benchmarks.shapes import SHAPES
from jsparse.executors.select import select_executor
from jsparse.model.ffn import KINDS
from jsparse.model.weights import FFNWeights

ROTATED_BYTES = 4e8
"""Weights that are rotated: more than any cache holds."""
CACHED_NEURONS = 1024
CACHED_REPEATS = 5
TOKENS = range(1, 17)
SPEC = KINDS["fatrelu"]


def first_neurons(ffn: FFNWeights, count: int) -> FFNWeights:
    """The layer of so many neurons, in memory of its own."""
    few = jax.tree.map(lambda leaf: leaf[:count] if len(leaf) == len(ffn.threshold) else leaf, ffn)
    return jax.tree.map(random_models.copy, few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B", help="default %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "int8", "int4"), nargs="+", default=["int8", "int4"])
    parser.add_argument("--rounds", type=positive, default=15, help="turns of each pass, default %(default)s")
    args = parser.parse_args()
    config, executor, probe, results = SHAPES[args.shape], select_executor("cpu"), cpu_probe(), []
    layer = random_models.random_layer(config, leading_rank=config.hidden_size // 16)
    inputs = {n: jax.random.normal(jax.random.key(n), (n, config.hidden_size)) for n in TOKENS}
    step = partial(executor.dense_ffn, spec=SPEC)
    for dtype in args.dtype:
        ffn = layer.stored(dtype)
        layers = rotated((ffn,), ROTATED_BYTES)
        cached = [(first_neurons(ffn, CACHED_NEURONS),)]
        passes = {n: one_after_another(step, x, layers) for n, x in inputs.items()}
        peaks = {n: one_after_another(step, x, cached, CACHED_REPEATS) for n, x in inputs.items()}
        for run in (*passes.values(), *peaks.values()):
            run()  # compiles
        taken: dict[int, list[float]] = {n: [] for n in TOKENS}
        rates: dict[int, list[float]] = {n: [] for n in TOKENS}
        readings = []
        for _ in track(range(args.rounds), dtype, console=Console(stderr=True), transient=True):
            for n in TOKENS:
                readings.append(probe.measure())
                taken[n].append(passes[n]())
                rates[n].append(3 * n * CACHED_NEURONS * config.hidden_size / peaks[n]())
        gbps = statistics.median(readings)
        adds = 3 * config.intermediate_size * config.hidden_size  # multiply-adds of a token
        whole = (n * adds / statistics.median(taken[n]) for n in TOKENS)
        peak = max(*map(statistics.median, rates.values()), *whole)
        reading = nbytes(ffn) / gbps / 1e9
        table = Table(
            title=f"{args.shape}, {dtype}: memory at {gbps:.1f} GB/s, {peak / 1e9:.0f} G multiply-adds a second"
        )
        for column in ("tokens", "ms", "reading", "multiply-adds", "times the larger", "of the peak in a cache"):
            table.add_column(column, justify="right")
        for n in TOKENS:
            median, computing = (
                statistics.median(taken[n]),
                3 * n * config.intermediate_size * config.hidden_size / peak,
            )
            entry = {"shape": args.shape, "dtype": dtype, "tokens": n, "ms": median * 1e3}
            entry |= {"reading_ms": reading * 1e3, "computing_ms": computing * 1e3}
            entry |= {
                "times_the_larger": median / max(reading, computing),
                "share_of_peak": statistics.median(rates[n]) / peak,
            }
            results.append(entry)
            cells = (f"{entry[key]:.2f}" for key in ("ms", "reading_ms", "computing_ms", "times_the_larger"))
            table.add_row(str(n), *cells, f"{entry['share_of_peak']:.0%}")
        Console(width=110).print(table)
    print(processor())
    print_json(results)


if __name__ == "__main__":
    main()
