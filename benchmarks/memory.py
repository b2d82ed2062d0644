"""How much memory calibration needs beside the weights: `python -m benchmarks.memory [--shape Llama-2-7B]`.

A few layers of random bfloat16 weights stand for the model: layers are fitted one after the other, so that more of them
add their weights and no more.
"""

import argparse
import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np

import jsparse
from benchmarks.shapes import SHAPES
from jsparse.model.parameters import make_weights


def random_weight(shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    if len(shape) == 1:
        return jnp.ones(shape, jnp.bfloat16)
    rows = [rng.standard_normal(shape[1], np.float32).astype(jnp.bfloat16) for _ in range(shape[0])]
    return jnp.asarray(np.stack(rows) / np.asarray(shape[1] ** 0.5, jnp.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args()
    config = dataclasses.replace(SHAPES[args.shape], num_layers=args.layers)
    rng = np.random.default_rng(0)
    weights = make_weights(config, lambda _, entry: random_weight(entry.shape, rng))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 1e9

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    print(f"weights {size:.2f} GB, peak so far {peak():.2f} GB", flush=True)
    jsparse.fit_predictors(
        jsparse.Params(config, weights),
        [rng.integers(0, config.vocab_size, args.tokens * 2)],
        tokens=args.tokens,
        on_layer=lambda report: print(f"layer {report.layer}: peak {peak():.2f} GB", flush=True),
    )
    print(f"{args.tokens:,} tokens: peak memory of the process {peak():.2f} GB, {peak() - size:.2f} beside the weights")
    print(json.dumps({"shape": args.shape, "tokens": args.tokens, "weights": size, "peak": peak()}))


if __name__ == "__main__":
    main()
