"""Find a shape's tile sizes on this GPU: `python -m pallas_kernels.tune --shape 11008,4096,1024 [--dtype bfloat16]`.

Measures the sparse FFN on random weights of which about a tenth of the neurons are predicted and active, a token at a
time, first over the tiles of `predict_gate_up`, then over those of `down`, and prints the row for `tiles.TABLE`.
Programs are compiled by all processors at once, and then measured one after the other.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import jax.numpy as jnp

from pallas_kernels import Matrix, sparse_ffn, unavailable
from pallas_kernels.tiles import Tiles, choose, generation

ROTATED_BYTES = 4e9
"""Weights that are read in turn: the tenth that is read is many times what an L2 cache holds."""
REPEATS = 50
"""Of the layers in one program, so that starting it does not count: a layer takes some 10 microseconds."""
GATE = {"neurons": (16, 32, 64), "rows": (1, 2, 4, 8), "columns": (1024, 4096), "gate_warps": (4, 8)}
DOWN = {"groups": (2, 4, 8), "slots": (2, 4, 8), "down_columns": (256, 512, 1024), "down_warps": (2, 4, 8)}
_LANES = 64
"""Most rows that a program of `down` holds at once."""


def random_layer(key: jax.Array, neurons: int, width: int, rank: int, dtype: str) -> list[Matrix]:
    """gate, up, down_t, threshold, a, b and bias; the predictor has 4 bits.

    The threshold is below any gate value, so that every predicted neuron is kept.
    """
    keys = jax.random.split(key, 5)

    def weight(key):
        if dtype == "int8":
            scale = jnp.full((neurons, 1), width**-0.5 / 64)
            return jax.random.randint(key, (neurons, width), -127, 128, jnp.int8), scale
        if dtype == "int4":
            codes, _ = int4(key, neurons, width)
            scales = jnp.full((neurons, -(-width // 32)), width**-0.5 / 4.6, jnp.float16)
            scales = jax.lax.bitcast_convert_type(scales, jnp.uint8).reshape(neurons, -1)
            return jnp.concatenate([codes, scales], axis=1), jnp.arange(-8.0, 8.0)
        return (jax.random.normal(key, (neurons, width)) * width**-0.5).astype(dtype)

    def int4(key, rows, columns):
        bits = jax.random.randint(key, (rows, -(-columns // 2)), 0, 256).astype(jnp.uint8)
        return bits, jnp.full((rows, 1), columns**-0.5 / 4.6)  # the nibbles' deviation: scores of variance 1

    predictor = int4(keys[3], rank, width), int4(keys[4], neurons, rank)
    threshold, bias = jnp.full((neurons,), -1e9), jnp.full((neurons,), -1.28)
    return [*(weight(k) for k in keys[:3]), threshold, *predictor, bias]


def compile_program(tiles: Tiles, x: jax.Array, layers: list[list[Matrix]]) -> Callable:
    """A program of x and the layers that runs all of them REPEATS times."""

    @jax.jit
    def program(x, layers):
        def once(_, x):
            for layer in layers:
                x = x + 0 * sparse_ffn(x, *layer, tiles=tiles)[0]
            return x

        return jax.lax.fori_loop(0, REPEATS, once, x)

    return program.lower(x, layers).compile()


def measure(program: Callable, x: jax.Array, layers: list[list[Matrix]], rounds: int) -> float:
    """Milliseconds of a layer: the fastest of so many rounds."""
    program(x, layers).block_until_ready()
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        program(x, layers).block_until_ready()
        taken.append(time.perf_counter() - begun)
    return min(taken) / REPEATS / len(layers) * 1e3


def candidates(start: Tiles, options: dict[str, tuple[int, ...]], width: int) -> list[Tiles]:
    sizes = [dict(zip(options, sizes)) for sizes in itertools.product(*options.values())]
    made = [dataclasses.replace(start, **s) for s in sizes if s.get("rows", 1) <= s.get("neurons", start.neurons)]
    limit = 1 << (width - 1).bit_length()
    return [
        tiles
        for tiles in made
        if tiles.groups * tiles.slots <= _LANES and max(tiles.columns, tiles.down_columns) <= max(limit, 1024)
    ]


def tune(x: jax.Array, layers: list, start: Tiles, rounds: int) -> tuple[Tiles, float]:
    """The fastest tiles and their milliseconds; what does not compile is left out, and said."""
    best, fastest = start, measure(compile_program(start, x, layers), x, layers, rounds)
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        for options in (GATE, DOWN):
            made = candidates(best, options, x.shape[1])
            programs = [compilers.submit(compile_program, tiles, x, layers) for tiles in made]
            wait(programs)
            for tiles, compiled in zip(made, programs):
                try:
                    taken = measure(compiled.result(), x, layers, rounds)
                except jax.errors.JaxRuntimeError as error:
                    print(f"left out {tiles}: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                print(f"{taken:.4f} ms {tiles}", file=sys.stderr)
                if taken < fastest:
                    best, fastest = tiles, taken
    return best, fastest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", required=True, help="neurons, width and predictor rank: 11008,4096,1024")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "int8", "int4"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(arguments)
    try:
        neurons, width, rank = (int(size) for size in args.shape.split(","))
        if min(neurons, width, rank) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--shape {args.shape} is not three positive numbers with commas")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds} and must be at least 1")
    if reason := unavailable():
        print(f"error: tile sizes are measured on a GPU: {reason}", file=sys.stderr)
        return 2
    bytes_per_layer = neurons * width * 3 * {"int4": 0.5625, "int8": 1, "float32": 4}.get(args.dtype, 2)
    count = max(2, round(ROTATED_BYTES / bytes_per_layer))
    layers = [random_layer(key, neurons, width, rank, args.dtype) for key in jax.random.split(jax.random.key(0), count)]
    x = jax.random.normal(jax.random.key(1), (1, width))
    dtype = "uint8" if args.dtype == "int4" else args.dtype
    start = choose(neurons, width, dtype)
    before = measure(compile_program(start, x, layers), x, layers, args.rounds)
    best, fastest = tune(x, layers, start, args.rounds)
    key = (generation(), neurons, width, dtype)
    print(
        f"{jax.devices()[0].device_kind}: {before:.4f} ms before, {fastest:.4f} ms after. For TABLE:", file=sys.stderr
    )
    print(f"    {key!r}: {best!r},")
    print(json.dumps({"gpu": key[0], "shape": [neurons, width, rank], "dtype": args.dtype, **vars(best)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
