"""Whole-model decoding at published shapes: `python -m benchmarks.decode [--shape ...] [--layers 8]`.

Random weights with the published sparsity, one sequence, context 1,100, at two operating points: the published one
(16-bit predictor) and ours (4 bits at a quarter of the width). jsparse dense and sparse in bfloat16 and int8, llama.cpp
in bf16 and q8_0 on the same shapes, and transformers in PyTorch bfloat16 take turns. A part of the layers lets all of
them fit in memory together; `--layers 0 --others` runs jsparse alone at full depth.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jsparse
from benchmarks import random_models
from benchmarks.random_models import OperatingPoint
from benchmarks.report import BandwidthProbe, interleave, print_json, print_rows, row, seconds
from benchmarks.shapes import SHAPES
from jsparse.decoder import weight_shapes
from jsparse.ffn import FFNSpec
from jsparse.ffn.select import select_executor
from jsparse.generation import DecodeState, Model, Sampling, bucket, decode_chunk
from jsparse.quantization import Matrix

CONTEXT = 1100
TOKENS = 8
"""Tokens a turn decodes."""
OTHERS = ("llama.cpp-bf16", "llama.cpp-q8_0", "transformers-bf16")
BYTES = {"bf16": 2.0, "q8_0": 34 / 32}
"""Per element."""


@dataclasses.dataclass
class Engine:
    """Something that decodes: `run` decodes TOKENS tokens at the context and returns the seconds.

    `read` is the bytes of weights and KV cache that a token takes.
    """

    run: Callable[[], float]
    read: float
    predicted: float = 1.0
    active: float = 1.0


def weights_of(config: jsparse.ModelConfig, layer: random_models.Layer, dtype: str) -> dict[str, Any]:
    """Weights of the whole model: every layer the same values in memory of its own."""
    rng = np.random.default_rng(1)
    made: dict[tuple[int, ...], Matrix] = {}

    def leaf(path, shape):
        name = jax.tree_util.keystr(path)
        if len(shape.shape) == 1:
            return jnp.full(shape.shape, 1.0 if "scale" in name else 0.0, jnp.float32)
        for part in ("gate", "up", "down_t"):
            if part in name:
                return random_models.store(getattr(layer.ffn, part), dtype)
        if shape.shape not in made:
            made[shape.shape] = random_models.random_matrix(rng, *shape.shape, shape.shape[1] ** -0.5)
        return random_models.store(made[shape.shape], dtype)

    return jax.tree_util.tree_map_with_path(leaf, weight_shapes(config))


class JsparseEngine:
    """The decode loop of `jsparse.generate` on a prepared cache."""

    def __init__(self, config, weights, caches: list, layer, point: OperatingPoint | None, executor: ModuleType):
        self._model = Model(config, executor, FFNSpec.of(config))
        self._weights, self._caches = weights, caches
        self._predictors = None
        if point is not None:
            predictor = layer.predictor(point)
            self._predictors = tuple(jax.tree.map(random_models.copy, predictor) for _ in range(config.num_layers))
        self._sampling = Sampling.create(config)
        self._counts = np.zeros(2)

    def run(self) -> float:
        begin = jnp.full((1,), CONTEXT - TOKENS // 2, jnp.int32)
        state = DecodeState(
            self._caches.pop(),
            jnp.ones((1,), jnp.int32),
            begin,
            jnp.zeros((1,), bool),
            jax.random.split(jax.random.key(0), 1),
        )
        result = []

        def step():
            result.extend(
                decode_chunk(
                    self._weights, self._predictors, state, self._sampling, jnp.int32(TOKENS), model=self._model
                )
            )
            return result[1]

        taken = seconds(step)
        self._caches.append(result[0].caches)
        self._counts = np.asarray(result[2]).sum(axis=0) / TOKENS
        return taken

    def engine(self) -> Engine:
        """After a first run, which counts the neurons."""
        self.run()
        config = self._model.config
        total = partial(sum_bytes, self._weights)
        ffn = sum(sum_bytes(self._weights[f"layers_{i}"]["ffn"]) for i in range(config.num_layers))
        other = total() - ffn - (0 if config.tie_embeddings else sum_bytes(self._weights["embed"]))
        cache = cache_bytes(self._caches[0])
        if self._predictors is None:
            return Engine(self.run, other + cache + ffn)
        predicted, active = self._counts / config.num_layers / config.intermediate_size
        read = other + cache + ffn * (predicted + 2 * active) / 3 + sum_bytes(self._predictors)
        return Engine(self.run, read, float(predicted), float(active))


def sum_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def cache_bytes(caches: tuple) -> float:
    """Of the slots that a token at the context reads."""
    return sum_bytes(caches) / caches[0][0].shape[1] * CONTEXT


def elements(config: jsparse.ModelConfig) -> int:
    """Of all matrices that a dense decode step multiplies with."""
    shapes = weight_shapes(config)
    unread = () if config.tie_embeddings else ("embed",)
    return sum(s.size for name in shapes if name not in unread for s in jax.tree.leaves(shapes[name]) if s.ndim == 2)


def random_caches(config: jsparse.ModelConfig) -> tuple:
    """A KV cache filled past the context, in bfloat16."""
    shape = (1, bucket(CONTEXT + TOKENS), config.num_kv_heads, config.head_dim)
    side = np.random.default_rng(2).standard_normal(shape, np.float32).astype(jnp.bfloat16)
    return tuple((random_models.copy(side), random_models.copy(side)) for _ in range(config.num_layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=8, help="layers of each model; 0 for all of them")
    parser.add_argument("--dtype", choices=("bfloat16", "int8"), nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--others", choices=OTHERS, nargs="*", default=OTHERS, help="engines beside jsparse; or none")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    probe, results = BandwidthProbe(), []
    for shape in args.shape:
        full = SHAPES[shape]
        config = dataclasses.replace(
            full,
            num_layers=min(args.layers or full.num_layers, full.num_layers),
            ffn_kind="fatrelu",
            ffn_threshold=random_models.threshold(),
        )
        results += measure(shape, config, args.dtype, args.others, args.rounds, probe)
    print_json(results)


def measure(shape, config, dtypes, others, rounds, probe) -> list[dict]:
    """The rows of one shape."""
    points = random_models.operating_points(shape, config)
    layer = random_models.random_layer(config, points[0].rank)
    caches = [random_caches(config)]  # one, which the engines take turns with
    engines: dict[tuple[str, str, str], Engine] = {}
    for dtype in dtypes:
        weights = weights_of(config, layer, dtype)
        for point in (None, *points):
            name = "jsparse" if point is None else f"jsparse, {point.name}"
            made = JsparseEngine(config, weights, caches, layer, point, select_executor("cpu"))
            engines[name, "sparse" if point else "dense", dtype] = made.engine()
    if others:
        from benchmarks import other_engines

        for other in others:
            name, dtype = other.split("-")
            run = other_engines.make(name, dtype, config, CONTEXT, TOKENS).run
            engines[name, "dense", dtype] = Engine(run, elements(config) * BYTES[dtype] + cache_bytes(caches[0]))
    return compare(shape, config, engines, rounds, probe)


def compare(shape: str, config, engines: dict[tuple[str, str, str], Engine], rounds: int, probe) -> list[dict]:
    """Time the engines (by name, mode and dtype) in turns, print the tables, and return the rows."""
    timings = interleave({key: engine.run for key, engine in engines.items()}, rounds, probe)
    timings = {key: [value / TOKENS for value in values] for key, values in timings.items()}
    rows = [
        row(
            name,
            shape,
            mode,
            dtype,
            timings=timings[name, mode, dtype],
            bytes_read=engine.read,
            limit_gbps=probe.gbps,
            predicted=engine.predicted,
            active=engine.active,
        )
        for (name, mode, dtype), engine in engines.items()
    ]
    print_rows(f"{shape}, {config.num_layers} layers, per token; memory reads at {probe.gbps:.1f} GB/s", rows)
    print_speedups(engines, timings)
    return rows


def print_speedups(engines: dict, timings: dict) -> None:
    """How many times faster each jsparse row is than each dense row: median of the rounds, and what the bytes allow."""
    dense = [key for key in engines if key[1] == "dense"]
    table = Table(title="times faster than (limit by bytes read)")
    for column in ("", *(f"{name} {dtype}" for name, _, dtype in dense)):
        table.add_column(column, justify="right")
    for key, engine in engines.items():
        if not key[0].startswith("jsparse"):
            continue
        cells = []
        for other in dense:
            faster = statistics.median(theirs / ours for theirs, ours in zip(timings[other], timings[key]))
            cells.append(f"{faster:.2f} ({engines[other].read / engine.read:.2f})")
        table.add_row(f"{key[0]}, {key[1]} {key[2]}", *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
