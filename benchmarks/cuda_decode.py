"""Whole-model decoding on an NVIDIA GPU: `python -m benchmarks.cuda_decode [--shape ...] [--interpret]`.

As `benchmarks.decode`: random weights with the published sparsity, one sequence, context 1,100, all layers, at the
published operating point and at ours; against plain JAX, jitted, and transformers in PyTorch, eager and compiled with a
static cache. Times are of whole tokens, host included.
"""

import argparse
import dataclasses

from benchmarks import gpu, other_engines, random_models
from benchmarks.decode import (
    CONTEXT,
    TOKENS,
    JsparseDecoder,
    cache_bytes,
    compare,
    elements,
    jsparse_engines,
    progress,
    random_caches,
    weights_of,
)
from benchmarks.plain_xla import PlainXla
from benchmarks.report import Engine, print_json
from jsparse.executors.kernels import KernelExecutor


def measure(shape: str, config, dtypes: list[str], kv_dtype: str, others: list[str], rounds: int, probe) -> list[dict]:
    points = random_models.operating_points(shape, config)
    layer = random_models.random_layer(config, points[0].rank)
    caches, engines = [random_caches(config, kv_dtype)], []
    for dtype in dtypes:
        progress(shape, f"jsparse in {dtype}")
        weights = weights_of(config, layer, dtype)
        if dtype in ("float16", "bfloat16") and kv_dtype != "int8":
            plain = JsparseDecoder(config, weights, caches, layer, None, PlainXla())
            engines.append(plain.engine("plain JAX", dtype))
        engines += jsparse_engines(config, weights, caches, layer, points, KernelExecutor("cuda"), dtype)
    for other in others:
        progress(shape, f"transformers, {other}")
        try:
            engine = other_engines.Transformers(
                config, CONTEXT, TOKENS, device="cuda", dtype="float16", compiled=other == "compiled"
            )
            engine.run()
        except Exception as error:  # the other engines' figures are worth having without it
            print(f"transformers, {other}, is left out: {type(error).__name__}: {error}")
            continue
        read = 2 * elements(config) + cache_bytes(caches[0])
        engines.append(Engine(f"transformers, {other}", "dense", "float16", engine.run, read))
    return compare(shape, config, engines, rounds, probe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu.add_arguments(parser)
    choices = ("float16", "bfloat16", "int8", "int4")
    parser.add_argument("--dtype", choices=choices, nargs="+", default=["float16", "int8"])
    parser.add_argument(
        "--kv-dtype", choices=("bfloat16", "int8"), default="bfloat16", help="keys and values of jsparse"
    )
    parser.add_argument("--others", choices=("eager", "compiled"), nargs="*", default=["eager", "compiled"])
    args = parser.parse_args()
    probe, results = None, []
    for shape, full in gpu.shapes(args).items():
        probe = probe or gpu.probe()
        config = dataclasses.replace(full, ffn_kind="fatrelu", ffn_threshold=random_models.threshold())
        others = [] if args.interpret else args.others
        results += measure(shape, config, args.dtype, args.kv_dtype, others, args.rounds, probe)
        print_json(results)


if __name__ == "__main__":
    main()
