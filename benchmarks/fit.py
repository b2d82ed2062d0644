"""How long one layer's predictor takes: `python -m benchmarks.fit [--shape Llama-2-7B] [--no-baseline]`.

The baseline is the construction written down naively: a full float64 SVD of the whitened gate, and the greedy that
raises thresholds one step at a time from a heap. Data are random activations with outlier channels.
"""

import argparse
import heapq
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import SHAPES
from jsparse.calibration import fit_layer
from jsparse.calibration_options import CalibrationOptions
from jsparse.params import FFNWeights
from jsparse.predictor import fit_svd
from jsparse.thresholds import calibrate_bias


def naive_thresholds(scores: np.ndarray, importance: np.ndarray, target: float, levels: int = 256) -> np.ndarray:
    """The greedy of `jsparse.thresholds`, one step at a time."""
    num_neurons, num_tokens = scores.shape
    order = np.argsort(scores, axis=1)
    lost = np.cumsum(np.take_along_axis(importance, order, axis=1), axis=1, dtype=np.float64)
    skipped = np.arange(levels) * num_tokens // (levels - 1)
    costs = np.where(skipped > 0, lost[:, np.maximum(skipped - 1, 0)], 0)
    level = np.clip((costs <= 0).sum(axis=1) - 1, 0, int(0.95 * (levels - 1)))
    heap = [(costs[j, q + 1] - costs[j, q], j) for j, q in enumerate(level)]
    heapq.heapify(heap)
    total, wanted, silenced = int(level.sum()), target * num_neurons * (levels - 1) - 1e-6, 0
    while total < wanted and silenced <= 0.01 * num_neurons:
        _, j = heapq.heappop(heap)
        level[j] += 1
        total += 1
        if level[j] < levels - 1:
            heapq.heappush(heap, (costs[j, level[j] + 1] - costs[j, level[j]], j))
        else:
            silenced += costs[j, -1] > 0
    at = np.maximum(skipped[level] - 1, 0)
    ascending = np.take_along_axis(scores, order, axis=1)
    return np.where(skipped[level] > 0, -ascending[np.arange(num_neurons), at], np.inf)


def timed(name: str, seconds: dict[str, float], function, *args, **options):
    begun = time.perf_counter()
    result = jax.block_until_ready(function(*args, **options))
    seconds[name] = time.perf_counter() - begun
    print(f"{name}: {seconds[name]:.1f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10_000, help="per half: for the SVD, and for the thresholds")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    width, neurons = config.hidden_size, config.intermediate_size
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, args.tokens, width), np.float32) * np.where(np.arange(width) % 499 == 3, 100, 1)
    x = x.astype(np.float32)
    gate, up, down_t = (jnp.asarray(rng.standard_normal((neurons, width), np.float32)) for _ in range(3))
    gram = np.asarray(x[0].T @ x[0], np.float64)
    target, seconds = 0.7, {}

    a, b = timed("fit_svd", seconds, fit_svd, gate, gram, args.rank)
    scores = np.asarray(b @ (a @ x[1].T))
    importance = np.asarray(jnp.square(jax.nn.relu(gate @ x[1].T)))
    bias = timed("calibrate_bias", seconds, calibrate_bias, scores, importance, target)
    if args.baseline:
        naive = timed("step-by-step thresholds", seconds, naive_thresholds, scores, importance, target)
        assert np.mean(np.isclose(naive, bias)) > 0.999, "the two greedies differ"
    del scores, importance
    if args.baseline:

        def full_svd():
            root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) / width * np.eye(width))
            return scipy.linalg.svd(np.asarray(gate, np.float64) @ root, full_matrices=False)

        timed("full float64 SVD", seconds, full_svd)
    options = CalibrationOptions(rank=args.rank, sparsity=0.7)
    layer = FFNWeights(gate, up, down_t)
    timed("whole layer, low-bit refit and importance included", seconds, fit_layer, layer, x, config, options, 2)

    ours = seconds["fit_svd"] + seconds["calibrate_bias"]
    table = Table(title=f"one {args.shape} layer, rank {args.rank}, {args.tokens:,} + {args.tokens:,} tokens")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    result = {"shape": args.shape, "rank": args.rank, "tokens": args.tokens, "seconds": seconds, "fit": ours}
    if args.baseline:
        result["ratio"] = (seconds["full float64 SVD"] + seconds["step-by-step thresholds"]) / ours
        print(f"predictor and thresholds: {ours:.1f} s, {result['ratio']:.1f} times faster than the baseline")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
