"""How long one layer's predictor takes: `python -m benchmarks.fit [--shape Llama-2-7B] [--no-baseline]`.

The baseline is the construction written down naively: a full float64 SVD of the whitened gate, and the greedy that
raises thresholds one step at a time from a heap. Data are random activations with outlier channels.
"""

import argparse
import heapq
import json
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import SHAPES
from jsparse.model.weights import FFNWeights
from jsparse.predictors.fit import fit_layer
from jsparse.predictors.options import CalibrationOptions
from jsparse.predictors.svd import fit_svd
from jsparse.predictors.thresholds import calibrate_bias


def naive_thresholds(scores: np.ndarray, importance: np.ndarray, target: float, levels: int = 256) -> np.ndarray:
    """The greedy of `jsparse.predictors.thresholds`, one step at a time."""
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


def timed(name: str, seconds: dict[str, list[float]], function, *args, **options):
    begun = time.perf_counter()
    result = jax.block_until_ready(function(*args, **options))
    seconds.setdefault(name, []).append(time.perf_counter() - begun)
    print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=10_000, help="per half: for the SVD, and for the thresholds")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds; the median counts")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    width, neurons = config.hidden_size, config.intermediate_size
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, args.tokens, width), np.float32)
    x *= np.where(np.arange(width) % 499 == 3, 100, 1).astype(np.float32)
    gate, up, down_t = (jnp.asarray(rng.standard_normal((neurons, width), np.float32)) for _ in range(3))
    layer = FFNWeights(gate, up, down_t, jnp.zeros(neurons))
    options = CalibrationOptions(rank=args.rank, sparsity=0.7)
    gram = np.asarray(x[0].T @ x[0], np.float64)
    target, rounds = 0.7, {}

    def full_svd():
        root = np.linalg.cholesky(gram + 1e-9 * np.trace(gram) / width * np.eye(width))
        return scipy.linalg.svd(np.asarray(gate, np.float64) @ root, full_matrices=False)

    a, b = timed("fit_svd with compilation", {}, fit_svd, gate, gram, args.rank)
    scores = np.asarray(b @ (a @ x[1].T))
    importance = np.asarray(jnp.square(jax.nn.relu(gate @ x[1].T)))
    bias = timed("calibrate_bias with compilation", {}, calibrate_bias, scores, importance, target)
    for _ in range(args.repeats):
        timed("fit_svd", rounds, fit_svd, gate, gram, args.rank)
        timed("calibrate_bias", rounds, calibrate_bias, scores, importance, target)
        timed("whole layer, low-bit refit and importance included", rounds, fit_layer, layer, x, config, options, 2)
        if args.baseline:
            naive = timed("step-by-step thresholds", rounds, naive_thresholds, scores, importance, target)
            timed("full float64 SVD", rounds, full_svd)
    if args.baseline and np.mean(np.isclose(naive, bias)) < 0.999:
        raise SystemExit("the step-by-step greedy gives other thresholds")

    seconds = {name: float(np.median(values)) for name, values in rounds.items()}
    ours = seconds["fit_svd"] + seconds["calibrate_bias"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    table = Table(title=f"one {args.shape} layer, rank {args.rank}, {args.tokens:,} + {args.tokens:,} tokens")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    result = {"shape": args.shape, "rank": args.rank, "tokens": args.tokens, "seconds": seconds, "fit": ours}
    result["peak_gigabytes"] = peak
    print(f"predictor and thresholds: {ours:.1f} s; peak memory of the process {peak:.1f} GB")
    if args.baseline:
        result["ratio"] = (seconds["full float64 SVD"] + seconds["step-by-step thresholds"]) / ours
        print(f"the baseline takes {result['ratio']:.1f} times as long")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
