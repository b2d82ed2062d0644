"""One FFN layer's decode step on an NVIDIA GPU: `python -m benchmarks.cuda_ffn [--shape ...] [--interpret]`.

Dense as plain JAX has it and as jsparse has it, and sparse with the published predictor and ours, against CUDA C
written by hand (CuPy) and PyTorch. Layers are rotated, so that no weight is in the L2 cache when its turn comes, and a
program runs all of them several times, so that its launch does not count. One JAX program is timed as a whole, gaps
between kernels included; CuPy and PyTorch run captured graphs and are timed by events.
"""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu, random_models
from benchmarks.plain_xla import PlainXla
from benchmarks.report import Engine, compare, print_json
from benchmarks.rotation import nbytes, one_after_another, predictor_for, rotated
from jsparse.executors.kernels import KernelExecutor, with_float_codebooks
from jsparse.model.ffn import KINDS

ROTATED_BYTES = 4e9
"""Weights that are rotated: a tenth of them is many times what an L2 cache holds."""
REPEATS = 100
"""Of the layers in one program, so that starting it does not count: a sparse layer takes some 10 microseconds."""
SPEC = KINDS["fatrelu"]
EXECUTOR = KernelExecutor("cuda")


def engines_of(
    layer: random_models.Layer, x: jax.Array, points: tuple, dtype: str, repeats: int, total: float
) -> list[Engine]:
    """Make the engines: plain JAX, jsparse dense, jsparse and CUDA C by hand at every operating point, and PyTorch.

    They take turns on copies of the layer that have `total` bytes together.
    """
    ffn = with_float_codebooks(layer.stored(dtype))
    alone = rotated((ffn,), total)
    engines = []
    dense = {"jsparse": EXECUTOR} if dtype == "int4" else {"XLA": PlainXla(), "jsparse": EXECUTOR}
    for name, executor in dense.items():
        run = one_after_another(partial(executor.dense_ffn, spec=SPEC), x, alone, repeats)
        engines.append(Engine(name, "dense", dtype, run, nbytes(ffn)))

    def sparse(x, ffn, predictor):
        return EXECUTOR.sparse_ffn(x, ffn, predictor, SPEC)[0]

    for point in points:
        predictor = predictor_for(layer, x, point, jnp.float16 if dtype == "float16" else jnp.bfloat16)
        y, counts = jax.jit(partial(EXECUTOR.sparse_ffn, spec=SPEC))(x, ffn, predictor)
        predicted, active = (np.asarray(counts[0]) / ffn.gate.shape[0]).tolist()
        read = nbytes(ffn) * (predicted + 2 * active) / 3 + nbytes(predictor)
        layers = rotated((ffn, predictor), total)
        run = one_after_another(sparse, x, layers, repeats)
        made = Engine(f"jsparse, {point.name}", "sparse", dtype, run, read, predicted, active)
        engines.append(made)
        if dtype == "float16" and (run := cuda_c_seconds(x, layers, repeats, y)):
            engines.append(dataclasses.replace(made, name=f"CUDA C, {point.name}", run=run))
    if dtype in ("float16", "bfloat16") and (run := torch_seconds(x, alone, repeats)):
        engines.append(Engine("torch", "dense", dtype, run, nbytes(ffn)))
    return engines


def cuda_c_seconds(x, layers, repeats: int, expected: jax.Array) -> Callable[[], float] | None:
    """None where there is no GPU or no CuPy, and where its result is not that of the Pallas kernels."""
    from benchmarks.cuda_c import CudaC

    if jax.default_backend() != "gpu":
        print("CUDA C by hand is left out: there is no GPU")
        return None
    try:
        made = CudaC(x, layers, random_models.threshold(), repeats)
    except ImportError:
        print("CUDA C by hand is left out: CuPy is not installed (pip install cupy-cuda13x)")
        return None
    except Exception as error:  # the other engines' figures are worth having without it
        print(f"CUDA C by hand is left out: {type(error).__name__}: {error}")
        return None
    error = np.abs(made.result - np.asarray(expected[0])).max() / np.abs(expected).max()
    if not error < 1e-4:
        print(f"CUDA C by hand is left out: it disagrees with the Pallas kernels, relative error {error:.1e}")
        return None
    return made.run


def torch_seconds(x: jax.Array, layers: list[tuple], repeats: int) -> Callable[[], float] | None:
    """PyTorch's dense FFN of all layers in a CUDA graph, by events; None where it has no GPU."""
    try:
        import torch
    except ImportError:
        print("torch is left out: it is not installed")
        return None
    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        print("torch is left out: it finds no GPU")
        return None
    linear = torch.nn.functional.linear
    held = [[torch.from_dlpack(m) for m in (ffn.gate, ffn.up, ffn.down_t)] for (ffn,) in layers]
    value = torch.from_numpy(np.array(x)).to(held[0][0])

    @torch.inference_mode()
    def steps():
        for gate, up, down_t in held:
            h = linear(value, gate)
            torch.where(h > random_models.threshold(), h, 0).mul_(linear(value, up)) @ down_t

    steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()

    def run() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats / len(held)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu.add_arguments(parser)
    choices = ("float16", "bfloat16", "int8", "int4")
    parser.add_argument("--dtype", choices=choices, nargs="+", default=["float16", "int8"])
    args = parser.parse_args()
    probe, results = None, []
    for shape, config in gpu.shapes(args).items():
        probe = probe or gpu.probe()
        points = random_models.operating_points(shape, config)
        layer = random_models.random_layer(config, points[0].rank)
        x = jax.random.normal(jax.random.key(0), (1, config.hidden_size))
        for dtype in args.dtype:
            engines = engines_of(layer, x, points, dtype, *((1, 0) if args.interpret else (REPEATS, ROTATED_BYTES)))
            results += compare("one FFN layer, one token", shape, engines, args.rounds, probe)[0]
            print_json(results)


if __name__ == "__main__":
    main()
