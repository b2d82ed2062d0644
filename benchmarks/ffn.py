"""One FFN layer's decode step: `python -m benchmarks.ffn [--shape ...] [--rounds 15]`.

Dense and sparse at 10, 30 and 50% predicted with 10% active, through the CPU executor, against XLA's float32 product
and PyTorch in bfloat16 and float32. Layers are rotated, so that no weight is in a cache when its turn comes.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import random_models
from benchmarks.report import BandwidthProbe, interleave, print_json, print_rows, row, seconds
from benchmarks.shapes import SHAPES
from jsparse.ffn import FFNSpec, reference
from jsparse.ffn.select import select_executor
from jsparse.params import FFNWeights

PREDICTED = (0.1, 0.3, 0.5)
ROTATED_BYTES = 6e8
"""Weights that are rotated: more than any cache holds."""


def executor_engines(layer: random_models.Layer, x: jax.Array, dtype: str, config) -> dict:
    """By (engine, mode, dtype, predicted), the CPU executor: a timed step, the bytes it reads, the share active."""
    executor = select_executor("cpu")
    spec = FFNSpec("fatrelu", random_models.threshold())
    copies = copies_of(layer.ffn, dtype)
    ffn_bytes = dense_bytes(copies[0])

    def sparse(x, ffn, predictor):
        return executor.sparse_ffn(x, ffn, predictor, spec)[0]

    dense = one_after_another(lambda x, ffn: executor.dense_ffn(x, ffn, spec), x, [(ffn,) for ffn in copies])
    engines = {("jsparse", "dense", dtype, 1.0): (dense, ffn_bytes, 1.0)}
    for share in PREDICTED:
        predictor = exactly(layer, x, random_models.OperatingPoint("ours", config.hidden_size // 4, 4, share))
        _, counts = executor.sparse_ffn(x, copies[0], predictor, spec)
        predicted, active = np.asarray(counts[0]) / config.intermediate_size
        read = ffn_bytes * (predicted + 2 * active) / 3 + sum(m.nbytes for m in jax.tree.leaves(predictor))
        layers = [(ffn, jax.tree.map(random_models.copy, predictor)) for ffn in copies]
        engines["jsparse", "sparse", dtype, predicted] = (one_after_another(sparse, x, layers), read, active)
    return engines


def copies_of(ffn: FFNWeights, dtype: str) -> list[FFNWeights]:
    """The layer as often as it takes to fill ROTATED_BYTES."""
    first = jax.tree.map(partial(random_models.store, dtype=dtype), ffn)
    count = max(2, round(ROTATED_BYTES / dense_bytes(first)))
    return [first] + [jax.tree.map(random_models.copy, first) for _ in range(count - 1)]


def one_after_another(step: Callable, x: jax.Array, layers: list[tuple]) -> Callable[[], float]:
    """Seconds of one layer, in a program that runs all of them on x, each after the one before."""

    @jax.jit
    def run(x, layers):
        for layer in layers:
            x = x + 0 * step(x, *layer)
        return x

    return lambda: seconds(lambda: run(x, layers)) / len(layers)


def exactly(layer, x, point):
    """The predictor with the bias that predicts just that share of the neurons of x."""
    predictor = layer.predictor(point)
    scores = reference.linear(reference.linear(x, predictor.a), predictor.b)[0]
    return dataclasses.replace(
        predictor, bias=jnp.full_like(predictor.bias, -jnp.quantile(scores, 1 - point.predicted))
    )


def dense_bytes(ffn: FFNWeights) -> float:
    return sum(m.nbytes for m in jax.tree.leaves(ffn))


def xla_engine(layer: random_models.Layer, x: jax.Array) -> dict:
    spec = FFNSpec("fatrelu", random_models.threshold())
    copies = copies_of(layer.ffn, "float32")
    run = one_after_another(lambda x, ffn: reference.dense_ffn(x, ffn, spec), x, [(ffn,) for ffn in copies])
    return {("XLA", "dense", "float32", 1.0): (run, dense_bytes(copies[0]), 1.0)}


def torch_engine(layer: random_models.Layer, x: jax.Array, dtype: torch.dtype, name: str) -> dict:
    limit = random_models.threshold()
    parts = (layer.ffn.gate, layer.ffn.up, layer.ffn.down_t.T)
    made = [torch.from_numpy(np.array(part.astype(jnp.float32))).to(dtype) for part in parts]
    size = sum(part.nbytes for part in made)
    copies = [[part.clone() for part in made] for _ in range(max(2, round(ROTATED_BYTES / size)))]
    value = torch.from_numpy(np.array(x)).to(dtype)

    @torch.inference_mode()
    def steps():
        linear = torch.nn.functional.linear
        for gate, up, down in copies:
            h = linear(value, gate)
            linear(torch.where(h > limit, h, 0) * linear(value, up), down)

    return {("torch", "dense", name, 1.0): (lambda: seconds(steps) / len(copies), size, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    probe, results = BandwidthProbe(), []
    for shape in args.shape:
        config = SHAPES[shape]
        layer = random_models.random_layer(config, leading_rank=config.hidden_size // 16)
        x = jax.random.normal(jax.random.key(0), (1, config.hidden_size))
        engines = {
            **executor_engines(layer, x, "bfloat16", config),
            **executor_engines(layer, x, "int8", config),
            **xla_engine(layer, x),
            **torch_engine(layer, x, torch.bfloat16, "bfloat16"),
            **torch_engine(layer, x, torch.float32, "float32"),
        }
        timings = interleave({key: run for key, (run, _, _) in engines.items()}, args.rounds, probe)
        rows = [
            row(
                engine,
                shape,
                mode,
                dtype,
                timings=timings[engine, mode, dtype, predicted],
                bytes_read=float(read),
                limit_gbps=probe.gbps,
                predicted=float(predicted),
                active=float(active),
            )
            for (engine, mode, dtype, predicted), (_, read, active) in engines.items()
        ]
        print_rows(f"{shape}: one FFN layer, one token; memory reads at {probe.gbps:.1f} GB/s", rows)
        results += rows
    print_json(results)


if __name__ == "__main__":
    main()
