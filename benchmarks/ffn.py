"""One FFN layer's decode step: `python -m benchmarks.ffn [--shape ...] [--rounds 15]`.

Dense and sparse at 10, 30 and 50% predicted with 10% active, through the CPU executor, against XLA's float32 product
and PyTorch in bfloat16 and float32. Layers are rotated, so that no weight is in a cache when its turn comes.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import random_models
from benchmarks.report import Engine, compare, cpu_probe, positive, print_json, seconds
from benchmarks.rotation import nbytes, one_after_another, predictor_for, rotated
from benchmarks.shapes import SHAPES
from jsparse.executors.select import select_executor
from jsparse.executors.xla import Xla
from jsparse.model.ffn import KINDS

PREDICTED = (0.1, 0.3, 0.5)
ROTATED_BYTES = 6e8
"""Weights that are rotated: more than any cache holds."""
SPEC = KINDS["fatrelu"]


def executor_engines(layer: random_models.Layer, x: jax.Array, dtype: str) -> list[Engine]:
    """The CPU executor, dense and at every share predicted."""
    executor = select_executor("cpu")
    ffn = layer.stored(dtype)

    def sparse(x, ffn, predictor):
        return executor.sparse_ffn(x, ffn, predictor, SPEC)[0]

    dense = one_after_another(partial(executor.dense_ffn, spec=SPEC), x, rotated((ffn,), ROTATED_BYTES))
    engines = [Engine("jsparse", "dense", dtype, dense, nbytes(ffn))]
    for share in PREDICTED:
        predictor = predictor_for(layer, x, random_models.OperatingPoint("ours", x.shape[1] // 4, 4, share))
        _, counts = executor.sparse_ffn(x, ffn, predictor, SPEC)
        predicted, active = (np.asarray(counts[0]) / ffn.gate.shape[0]).tolist()
        read = nbytes(ffn) * (predicted + 2 * active) / 3 + nbytes(predictor)
        run = one_after_another(sparse, x, rotated((ffn, predictor), ROTATED_BYTES))
        engines.append(Engine("jsparse", "sparse", dtype, run, read, predicted, active))
    return engines


def xla_engine(layer: random_models.Layer, x: jax.Array) -> Engine:
    ffn = layer.stored("float32")
    run = one_after_another(partial(Xla().dense_ffn, spec=SPEC), x, rotated((ffn,), ROTATED_BYTES))
    return Engine("XLA", "dense", "float32", run, nbytes(ffn))


def torch_engine(layer: random_models.Layer, x: jax.Array, name: str) -> Engine:
    dtype, linear = getattr(torch, name), torch.nn.functional.linear
    parts = (layer.ffn.gate, layer.ffn.up, layer.ffn.down_t.T)
    made = [torch.from_numpy(np.array(part.astype(jnp.float32))).to(dtype) for part in parts]
    size = sum(part.nbytes for part in made)
    copies = [[part.clone() for part in made] for _ in range(max(2, round(ROTATED_BYTES / size)))]
    value = torch.from_numpy(np.array(x)).to(dtype)

    @torch.inference_mode()
    def steps():
        for gate, up, down in copies:
            h = linear(value, gate)
            linear(torch.where(h > random_models.threshold(), h, 0) * linear(value, up), down)

    return Engine("torch", "dense", name, lambda: seconds(steps) / len(copies), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=positive, default=15)
    args = parser.parse_args()
    probe, results = cpu_probe(), []
    for shape in args.shape:
        config = SHAPES[shape]
        layer = random_models.random_layer(config, leading_rank=config.hidden_size // 16)
        x = jax.random.normal(jax.random.key(0), (1, config.hidden_size))
        engines = [
            *executor_engines(layer, x, "bfloat16"),
            *executor_engines(layer, x, "int8"),
            *executor_engines(layer, x, "int4"),
            xla_engine(layer, x),
            torch_engine(layer, x, "bfloat16"),
            torch_engine(layer, x, "float32"),
        ]
        results += compare("one FFN layer, one token", shape, engines, args.rounds, probe)[0]
    print_json(results)


if __name__ == "__main__":
    main()
