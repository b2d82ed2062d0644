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

import jsparse
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
    """Copy the layer's first neurons into memory of their own."""
    few = jax.tree.map(lambda leaf: leaf[:count] if len(leaf) == len(ffn.threshold) else leaf, ffn)
    return jax.tree.map(random_models.copy, few)


def measure(config: jsparse.ModelConfig, layer: random_models.Layer, dtype: str, rounds: int, probe) -> list[dict]:
    """Time the passes in turns; an entry for every number of tokens."""
    ffn, step = layer.stored(dtype), partial(select_executor("cpu").dense_ffn, spec=SPEC)
    layers, cached = rotated((ffn,), ROTATED_BYTES), [(first_neurons(ffn, CACHED_NEURONS),)]
    inputs = {n: jax.random.normal(jax.random.key(n), (n, config.hidden_size)) for n in TOKENS}
    passes = {n: one_after_another(step, x, layers) for n, x in inputs.items()}
    of_cached = {n: one_after_another(step, x, cached, CACHED_REPEATS) for n, x in inputs.items()}
    for run in (*passes.values(), *of_cached.values()):
        run()  # compiles
    seconds: dict[int, list[float]] = {n: [] for n in TOKENS}
    seconds_cached: dict[int, list[float]] = {n: [] for n in TOKENS}
    readings = []
    for _ in track(range(rounds), dtype, console=Console(stderr=True), transient=True):
        for n in TOKENS:
            readings.append(probe.measure())
            seconds[n].append(passes[n]())
            seconds_cached[n].append(of_cached[n]())
    of_neuron = 3 * config.hidden_size  # multiply-adds for a token
    median = {n: statistics.median(seconds[n]) for n in TOKENS}
    rate = {n: n * CACHED_NEURONS * of_neuron / statistics.median(seconds_cached[n]) for n in TOKENS}
    adds = {n: n * config.intermediate_size * of_neuron for n in TOKENS}
    peak = max(*rate.values(), *(adds[n] / median[n] for n in TOKENS))
    gbps = statistics.median(readings)
    reading = nbytes(ffn) / gbps / 1e9
    return [
        {
            "dtype": dtype,
            "tokens": n,
            "gbps": gbps,
            "peak": peak,
            "ms": median[n] * 1e3,
            "reading_ms": reading * 1e3,
            "computing_ms": adds[n] / peak * 1e3,
            "times_the_larger": median[n] / max(reading, adds[n] / peak),
            "share_of_peak": rate[n] / peak,
        }
        for n in TOKENS
    ]


def print_table(shape: str, entries: list[dict]) -> None:
    first = entries[0]
    memory, peak = f"memory at {first['gbps']:.1f} GB/s", f"{first['peak'] / 1e9:.0f} G multiply-adds a second"
    table = Table(title=f"{shape}, {first['dtype']}: {memory}, {peak}")
    for column in ("tokens", "ms", "reading", "multiply-adds", "times the larger", "of the peak in a cache"):
        table.add_column(column, justify="right")
    for entry in entries:
        cells = (f"{entry[key]:.2f}" for key in ("ms", "reading_ms", "computing_ms", "times_the_larger"))
        table.add_row(str(entry["tokens"]), *cells, f"{entry['share_of_peak']:.0%}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B", help="default %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "int8", "int4"), nargs="+", default=["int8", "int4"])
    parser.add_argument("--rounds", type=positive, default=15, help="turns of each pass, default %(default)s")
    args = parser.parse_args()
    config, probe, results = SHAPES[args.shape], cpu_probe(), []
    layer = random_models.random_layer(config, leading_rank=config.hidden_size // 16)
    for dtype in args.dtype:
        entries = measure(config, layer, dtype, args.rounds, probe)
        print_table(args.shape, entries)
        results += [{"shape": args.shape, **entry} for entry in entries]
    print(processor())
    print_json(results)


if __name__ == "__main__":
    main()
