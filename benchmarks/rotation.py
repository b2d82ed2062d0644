"""What the benchmarks of one FFN layer share: copies run in turn, so that no weight is in a cache at its turn."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import random_models
from benchmarks.report import seconds
from jsparse.executors.xla import linear
from jsparse.model.weights import Predictor


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def rotated(layer: tuple, total: float) -> list[tuple]:
    """Copies of a layer's arrays in memory of their own, from 2 to 64, about that many bytes."""
    count = int(np.clip(round(total / nbytes(layer)), 2, 64))
    return [jax.tree.map(random_models.copy, layer) for _ in range(count)]


def one_after_another(step: Callable, x: jax.Array, layers: list[tuple], repeats: int = 1) -> Callable[[], float]:
    """Seconds of a layer in a program that runs all of them on x, each after the one before, so many times."""

    @jax.jit
    def program(x, layers):
        def once(_, x):
            for layer in layers:
                x = x + 0 * step(x, *layer)
            return x

        return jax.lax.fori_loop(0, repeats, once, x)

    return lambda: seconds(lambda: program(x, layers)) / repeats / len(layers)


def predictor_for(
    layer: random_models.Layer, x: jax.Array, point: random_models.OperatingPoint, dtype=jnp.bfloat16
) -> Predictor:
    """The predictor with the bias that predicts just that share of the neurons of x; 16-bit factors in that dtype."""
    predictor = jax.tree.map(lambda m: m.astype(dtype) if m.dtype == jnp.bfloat16 else m, layer.predictor(point))
    scores = linear(linear(x, predictor.a), predictor.b)[0]
    bias = jnp.full_like(predictor.bias, -jnp.quantile(scores, 1 - point.predicted))
    return dataclasses.replace(predictor, bias=bias)
