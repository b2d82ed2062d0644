"""What the GPU benchmarks share: the device or its interpretation, and a bandwidth probe."""

import argparse
import dataclasses
import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # other engines need memory too


import jax
import jax.numpy as jnp

import jsparse
import pallas_kernels
from benchmarks.report import BandwidthProbe, positive, seconds
from benchmarks.shapes import SHAPES

PASSES = 8
SMALL = dataclasses.replace(
    SHAPES["Llama-2-7B"],
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    vocab_size=256,
    name="small",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument(
        "--interpret", action="store_true", help="a tiny shape, kernels interpreted: shows that it runs, not how fast"
    )


def shapes(args: argparse.Namespace) -> dict[str, jsparse.ModelConfig]:
    """The shapes to measure. Exits with 2 where there is no GPU to measure."""
    if args.interpret:
        if jax.default_backend() == "gpu":
            print("There is a GPU: the kernels are compiled, for a shape too small to measure anything.")
        else:
            print("Pallas kernels are interpreted: the times below say nothing about a GPU.")
        return {"small": SMALL}
    if reason := pallas_kernels.unavailable():
        print(f"error: {reason}; or --interpret runs a tiny shape on any machine", file=sys.stderr)
        raise SystemExit(2)
    return {name: SHAPES[name] for name in args.shape}


@jax.jit
def _read(data: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, PASSES, lambda i, total: jnp.sum(data + total[:, None], axis=1), data[:, 0])


def probe() -> BandwidthProbe:
    """A probe that adds up rows, as a dense product does."""
    data = jnp.ones((1 << 16, 1 << 12), jnp.float32)
    return BandwidthProbe(lambda: seconds(lambda: _read(data)), PASSES * data.nbytes)
