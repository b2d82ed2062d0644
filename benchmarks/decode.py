"""Whole-model decoding at published shapes: `python -m benchmarks.decode [--shape ...] [--layers 8]`.

Random weights with the published sparsity, one sequence, context 1,100, at two operating points: the published one
(16-bit predictor) and ours (4 bits at a quarter of the width). jsparse dense and sparse in bfloat16, int8 and int4,
llama.cpp on the same shapes, and transformers in PyTorch bfloat16 take turns. A part of the layers lets several
of them fit in memory together; `--layers 0 --others` runs jsparse alone at full depth.
"""

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jsparse
from benchmarks import random_models, report
from benchmarks.random_models import OperatingPoint
from benchmarks.report import Engine, cpu_probe, positive, print_json, seconds
from benchmarks.rotation import nbytes
from benchmarks.shapes import SHAPES
from jsparse.arrays import Matrix
from jsparse.decoding.forward import Model
from jsparse.decoding.loop import bucket, initial_state, step_chunk
from jsparse.decoding.sampling import Sampling
from jsparse.executors.select import select_executor
from jsparse.model.cache import LayerCache, quantize_heads
from jsparse.model.executor import Executor
from jsparse.model.parameters import Parameter, make_weights, parameters
from jsparse.model.weights import Weights

CONTEXT = 1100
TOKENS = 8
"""Tokens a turn decodes."""
RESERVED_GB = 4.0
"""Beside the weights: predictors, the KV caches, weights on their way, the bandwidth probe."""
OTHERS = ("llama.cpp-bf16", "llama.cpp-q8_0", "llama.cpp-q4_0", "llama.cpp-q4_k_m", "transformers-bf16")
DEFAULT_OTHERS = ("llama.cpp-bf16", "llama.cpp-q8_0", "transformers-bf16")
BYTES = {
    "bfloat16": 2.0,
    "int8": 1.0,
    "int4": 18 / 32,
    "bf16": 2.0,
    "f16": 2.0,
    "q8_0": 34 / 32,
    "q4_0": 18 / 32,
    "q4_k_m": 20 / 32,
}
"""Per element; of q4_k_m about."""
LLAMA_KV = {"bfloat16": "f16", "int8": "q8_0"}
"""What llama.cpp stores keys and values in beside ours."""


def weights_of(config: jsparse.ModelConfig, layer: random_models.Layer, dtype: str) -> Weights:
    """Weights of the whole model: every layer the same values in memory of its own."""
    rng = np.random.default_rng(1)
    made: dict[tuple, Matrix] = {}

    def leaf(path: str, entry: Parameter) -> Matrix:
        if entry.role in ("norm", "bias"):
            return jnp.full(entry.shape, float(entry.role == "norm"), jnp.float32)
        name = path.rpartition("/")[2] if "/ffn/" in path else ""
        if (key := (name, entry.shape, entry.role)) not in made:
            drawn = getattr(layer.ffn, name) if name else None
            if drawn is None:
                drawn = random_models.random_matrix(rng, *entry.shape, entry.shape[1] ** -0.5)
            made[key] = random_models.store(drawn, dtype, entry.role)
        return jax.tree.map(random_models.copy, made[key])

    return make_weights(config, leaf)


class JsparseDecoder:
    """The decode loop of `jsparse.generate` on a prepared cache, which is one that all of them take turns with."""

    def __init__(self, config, weights, caches: list, layer, point: OperatingPoint | None, executor: Executor):
        self._model = Model(config, executor, config.ffn_spec())
        self._weights, self._caches = executor.place(weights, None)[0], caches
        self._predictors = None
        if point is not None:
            predictor = layer.predictor(point)
            self._predictors = tuple(jax.tree.map(random_models.copy, predictor) for _ in range(config.num_layers))
        self._counts = np.zeros(2)

    def run(self) -> float:
        greedy = Sampling.create(self._model.config.vocab_size)
        lengths = np.full(1, CONTEXT - TOKENS // 2 + 1, np.int32)
        state = initial_state(lengths, np.full(1, TOKENS, np.int32), 0, greedy)
        caches, result = self._caches.pop(), []

        def step():
            operands = self._weights, self._predictors, caches, state, jnp.int32(TOKENS)
            result.extend(step_chunk(*operands, model=self._model, draws=False))
            return result[2]

        taken = seconds(step)
        self._caches.append(result[0])
        self._counts = np.asarray(result[4]).sum(axis=0) / TOKENS
        return taken / TOKENS

    def engine(self, name: str, dtype: str) -> Engine:
        """After a first run, which counts the neurons."""
        self.run()
        config = self._model.config
        ffn = sum(nbytes(layer.ffn) for layer in self._weights.layers)
        other = nbytes(self._weights) - ffn - (0 if config.tie_embeddings else nbytes(self._weights.embed))
        other += cache_bytes(self._caches[0])
        if self._predictors is None:
            return Engine(name, "dense", dtype, self.run, other + ffn)
        predicted, active = (self._counts / config.num_layers / config.intermediate_size).tolist()
        read = other + ffn * (predicted + 2 * active) / 3 + nbytes(self._predictors)
        return Engine(name, "sparse", dtype, self.run, read, predicted, active)


def jsparse_engines(config, weights, caches: list, layer, points, executor: Executor, dtype: str) -> list[Engine]:
    """Dense, and sparse at each operating point, on the same weights."""
    return [
        JsparseDecoder(config, weights, caches, layer, point, executor).engine(
            "jsparse" if point is None else f"jsparse, {point.name}", dtype
        )
        for point in (None, *points)
    ]


def cache_bytes(caches: tuple) -> float:
    """Of the slots that a token at the context reads."""
    return nbytes(caches) / caches[0].num_slots * CONTEXT


def elements(config: jsparse.ModelConfig, unread: Sequence[str] = ("embed",)) -> int:
    """Of all matrices that a dense decode step multiplies with."""
    unread = () if config.tie_embeddings else unread
    return sum(
        math.prod(entry.shape)
        for entry in parameters(config).values()
        if len(entry.shape) == 2 and entry.role not in unread
    )


def random_caches(config: jsparse.ModelConfig, dtype: str) -> tuple:
    """A KV cache in that dtype, filled past the context."""
    shape = (1, bucket(CONTEXT + TOKENS), config.num_kv_heads, config.head_dim)
    drawn = jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))
    side, scale = quantize_heads(drawn) if dtype == "int8" else (drawn.astype(dtype), None)
    cache = LayerCache(side, side, scale, scale)
    return tuple(jax.tree.map(random_models.copy, cache) for _ in range(config.num_layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES), help="default: all")
    parser.add_argument("--layers", type=int, default=8, help="of each model, default %(default)s; 0 for all of them")
    dtypes = ("bfloat16", "int8", "int4")
    parser.add_argument(
        "--dtype", choices=dtypes, nargs="+", default=dtypes[:2], help="weights of jsparse, default: %(default)s"
    )
    parser.add_argument(
        "--kv-dtype",
        choices=tuple(LLAMA_KV),
        default="bfloat16",
        help="keys and values of jsparse, default %(default)s",
    )
    parser.add_argument(
        "--others",
        choices=OTHERS,
        nargs="*",
        default=DEFAULT_OTHERS,
        help="engines beside jsparse, default: %(default)s; alone, none",
    )
    parser.add_argument(
        "--llama-kv-dtype",
        choices=LLAMA_KV.values(),
        help="of llama.cpp, default: f16 beside bfloat16 and q8_0 beside int8",
    )
    parser.add_argument("--rounds", type=positive, default=15, help="turns of each engine, default %(default)s")
    args = parser.parse_args()
    if args.layers < 0:
        parser.error(f"--layers is {args.layers} and must be at least 0")
    configs = {
        name: dataclasses.replace(
            SHAPES[name],
            num_layers=min(args.layers or SHAPES[name].num_layers, SHAPES[name].num_layers),
            ffn_kind="fatrelu",
            ffn_threshold=random_models.threshold(),
        )
        for name in args.shape
    }
    for name, config in configs.items():
        if reason := too_large(config, [*(f"jsparse-{dtype}" for dtype in args.dtype), *args.others]):
            print(f"error: {name}, {reason}", file=sys.stderr)
            raise SystemExit(2)
    probe, results = cpu_probe(), []
    for name, config in configs.items():
        kv_dtypes = args.kv_dtype, args.llama_kv_dtype or LLAMA_KV[args.kv_dtype]
        results += measure(name, config, args.dtype, kv_dtypes, args.others, args.rounds, probe)
    print_json(results)


def too_large(config: jsparse.ModelConfig, engines: Sequence[str]) -> str | None:
    """Why the engines, each a name and a dtype, do not fit in memory together; None if they do, or if none can tell.

    Out of memory nothing fails: llama.cpp's weights lie in a mapped file, which is then read from the disk, token by
    token, and its figures are wrong.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    available = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    needed = elements(config, unread=()) * sum(BYTES[engine.split("-")[1]] for engine in engines) / 1e9 + RESERVED_GB
    if needed * 1e6 <= available:
        return None
    return (
        f"{config.num_layers} layers: {', '.join(engines)} take about {needed:.0f} GB together and "
        f"{available / 1e6:.0f} are available; measure fewer at once with --dtype, --others or --layers"
    )


def measure(shape, config, dtypes, kv_dtypes, others, rounds, probe) -> list[dict]:
    """The rows of one shape. Keys and values are in the first of two dtypes, those of llama.cpp in the second."""
    points = random_models.operating_points(shape, config)
    layer = random_models.random_layer(config, points[0].rank)
    caches = [random_caches(config, kv_dtypes[0])]
    engines = []
    for dtype in dtypes:
        progress(shape, f"jsparse in {dtype}")
        weights = weights_of(config, layer, dtype)
        engines += jsparse_engines(config, weights, caches, layer, points, select_executor("cpu"), dtype)
    if others:
        from benchmarks import other_engines

        for other in others:
            progress(shape, other)
            name, dtype = other.split("-")
            if name == "transformers":
                kv_dtype, made = "bf16", other_engines.Transformers(config, CONTEXT, TOKENS)
                read = elements(config) * BYTES[dtype]
            else:
                kv_dtype, made = kv_dtypes[1], other_engines.LlamaCpp(config, dtype, kv_dtypes[1], CONTEXT, TOKENS)
                read = made.read
            read += 2 * config.num_layers * config.num_kv_heads * config.head_dim * CONTEXT * BYTES[kv_dtype]
            engines.append(Engine(name, "dense", dtype, made.run, read))
    return compare(shape, config, engines, rounds, probe)


def progress(shape: str, engine: str) -> None:
    """Weights of gigabytes are made and a model compiled: that takes minutes."""
    print(f"{shape}: preparing {engine}", file=sys.stderr, flush=True)


def compare(shape: str, config, engines: list[Engine], rounds: int, probe) -> list[dict]:
    """Time the engines in turns, print the tables, and return the rows."""
    print(f"{shape}: {rounds} rounds of {len(engines)} engines", file=sys.stderr, flush=True)
    rows, timings = report.compare(f"{config.num_layers} layers, one token", shape, engines, rounds, probe)
    print_speedups(engines, timings)
    return rows


def print_speedups(engines: list[Engine], timings: list[list[float]]) -> None:
    """How many times faster each jsparse row is than each dense row: median of the rounds, its 95% interval, and what
    the bytes allow."""
    dense = [i for i, engine in enumerate(engines) if engine.mode == "dense"]
    table = Table(title=f"times faster than, 95% (limit by bytes read); {report.processor()}")
    for column in ("", *(f"{engines[i].name} {engines[i].dtype}" for i in dense)):
        table.add_column(column, justify="right")
    for engine, ours in zip(engines, timings):
        if not engine.name.startswith("jsparse"):
            continue
        cells = []
        for i in dense:
            faster = [theirs / own for theirs, own in zip(timings[i], ours)]
            low, high = report.interval(faster, np.median)
            limit = engines[i].read / engine.read
            cells.append(f"{statistics.median(faster):.2f}, {low:.2f} to {high:.2f} ({limit:.2f})")
        table.add_row(f"{engine.name}, {engine.mode} {engine.dtype}", *cells)
    Console(width=60 + 30 * len(dense)).print(table)


if __name__ == "__main__":
    main()
