"""Calibrated thresholds: how far each neuron's predicted score must rise before the neuron is computed.

Skipping neuron j on the tokens where its score is lowest costs the importance it had there. Thresholds sit on a grid
of quantile levels per neuron, and levels are raised one at a time, cheapest first (SVDP, arXiv 2603.14110).
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jsparse.errors import JsparseError
from jsparse.typing import Array, Float, Int

BiasMode = Literal["neuron", "layer", "none"]
SilencedRule = Literal["spare", "stop"]
_MAX_START = 0.95
_MAX_SILENCED_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class Levels:
    """The outcome of the greedy: a level per neuron.

    Attributes:
      level: (F,) int32; level q of `levels` skips the neuron on the q / (levels - 1) share of lowest scores.
      mean: mean of level / (levels - 1), the share of neurons skipped on the calibration tokens.
      stopped_early: whether the target was out of reach: all steps that the rule on silenced neurons allows were taken.
    """

    level: Int[Array, "F"]
    mean: float
    stopped_early: bool


def calibrate_bias(
    scores: Float[Array, "F n"],
    importance: Float[Array, "_ _"],
    target: float,
    *,
    levels: int = 256,
    mode: BiasMode = "neuron",
    silenced: SilencedRule = "spare",
) -> Float[Array, "F"]:
    """The bias that makes `score + bias > 0` skip the target share of neurons at the least lost importance.

    Args:
      scores: predicted scores of every neuron on n calibration tokens.
      importance: what skipping the neuron on that token costs, at least 0.
      target: share of (neuron, token) pairs to skip, 0 to 1.
      levels: size of the grid of quantile levels per neuron.
      silenced: what ends the raising of rare neurons, as in `raise_levels`.
      mode: `neuron` runs the greedy; `layer` sets one constant, the target quantile of all scores; `none` is 0.

    Returns:
      bias (F,) float32: minus the threshold score; +inf where a neuron is never skipped.

    Raises:
      JsparseError: target or levels out of range, or shapes that differ.
    """
    if scores.shape != importance.shape:
        raise JsparseError(f"scores have shape {scores.shape} but importance has {importance.shape}")
    if not 0 <= target <= 1:
        raise JsparseError(f"the target sparsity is {target}; it must be between 0 and 1")
    if levels < 2:
        raise JsparseError(f"levels is {levels}; it must be at least 2")
    if mode == "none":
        return jnp.zeros(scores.shape[0])
    if mode == "layer":
        return jnp.full(scores.shape[0], layer_bias(scores, target))
    thresholds, costs = level_costs(scores, importance, levels)
    return bias_at(thresholds, raise_levels(costs, target, silenced=silenced).level)


def layer_bias(scores: Float[Array, "F n"], target: float) -> Float[Array, ""]:
    """One constant for all neurons: minus the k-th smallest of all scores, k the target share of their number."""
    count = round(target * scores.size)
    if count == 0:
        return jnp.float32(jnp.inf)
    with jax.enable_x64(True):
        return -_from_key(jnp.sort(_sort_key(scores.reshape(-1)))[count - 1])


def level_costs(
    scores: Float[Array, "F n"], importance: Float[Array, "F n"], levels: int
) -> tuple[Float[Array, "F levels"], Float[Array, "F levels"]]:
    """Per neuron and level, the threshold score and the importance lost below it (float64).

    Level q skips the k = floor(q n / (levels - 1)) tokens of lowest score; its threshold is the k-th smallest score,
    -inf for k = 0. Neurons are independent, so callers may pass them in blocks.
    """
    with jax.enable_x64(True):
        return _level_costs(jnp.asarray(scores, jnp.float32), jnp.asarray(importance, jnp.float32), levels)


def raise_levels(costs: Float[Array, "F levels"], target: float, *, silenced: SilencedRule = "spare") -> Levels:
    """Run the greedy over the whole layer.

    Every neuron starts at its highest level of zero cost, at most 95%. The cheapest next step of any neuron is taken
    (the lowest neuron first among equals) until the mean level reaches the target. A neuron at the last level is off
    on all tokens; it is silenced if that costs something, and at most 1% of the neurons may be:

    - `spare`: when they are, the others stay below the last level and the greedy goes on. Many neurons fire on a few
      tokens only, and one that is kept for those costs next to nothing.
    - `stop`: the greedy ends as soon as more than 1% are silenced (the published rule; in a model with many rare
      neurons it ends far from the target).

    A neuron's steps are taken in order, so the greedy visits them in the order of the running maxima of their costs:
    one stable sort replaces the loop.
    """
    with jax.enable_x64(True):
        level, early = _raise_levels(jnp.asarray(costs, jnp.float64), jnp.float64(target), silenced)
        mean = float(jnp.mean(level.astype(jnp.float64))) / (costs.shape[1] - 1)
        return Levels(level, mean, bool(early))


def bias_at(thresholds: Float[Array, "F levels"], level: Int[Array, "F"]) -> Float[Array, "F"]:
    """The bias of neurons whose thresholds are at the given levels."""
    return -jnp.take_along_axis(thresholds, level[:, None], axis=1)[:, 0]


@partial(jax.jit, static_argnames="levels")
def _level_costs(scores, importance, levels):
    num_tokens = scores.shape[1]
    # One sort of 64-bit integers that carry the score above the importance: far faster than sorting by key.
    packed = (_sort_key(scores).astype(jnp.int64) << 32) | importance.view(jnp.int32).astype(jnp.int64)
    packed = jnp.sort(packed, axis=1)
    lost = jnp.cumsum((packed & 0xFFFFFFFF).astype(jnp.int32).view(jnp.float32).astype(jnp.float64), axis=1)
    skipped = jnp.arange(levels) * num_tokens // (levels - 1)
    at = jnp.maximum(skipped - 1, 0)
    thresholds = _from_key((packed[:, at] >> 32).astype(jnp.int32))
    none = skipped == 0
    return jnp.where(none, -jnp.inf, thresholds), jnp.where(none, 0.0, lost[:, at])


def _sort_key(scores):
    """int32 whose order is the float32 scores' order."""
    bits = (scores + 0.0).view(jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_key(key):
    return jnp.where(key < 0, key ^ 0x7FFFFFFF, key).astype(jnp.int32).view(jnp.float32)


@partial(jax.jit, static_argnames="silenced")
def _raise_levels(costs, target, silenced):
    num_neurons, levels = costs.shape
    start = jnp.sum(costs <= 0, axis=1) - 1
    start = jnp.clip(start, 0, int(_MAX_START * (levels - 1)))
    step = jnp.arange(levels - 1)
    open_step = step >= start[:, None]
    price = jnp.where(open_step, costs[:, 1:] - costs[:, :-1], -jnp.inf)
    # Steps below the start sort to the end, all others by running maximum, then neuron, then step.
    price = jnp.where(open_step, jax.lax.cummax(price, axis=1), jnp.inf).reshape(-1)
    order = jnp.argsort(price, stable=True)
    num_open = jnp.sum(open_step)
    silences = (order % (levels - 1) == levels - 2) & (costs[:, -1] > 0)[order // (levels - 1)]
    num_silenced = jnp.cumsum(silences)
    usable = jnp.arange(price.size) < num_open
    if silenced == "spare":
        usable &= ~silences | (num_silenced <= _MAX_SILENCED_SHARE * num_neurons)
    else:
        usable &= num_silenced - silences <= _MAX_SILENCED_SHARE * num_neurons
    wanted = jnp.ceil(target * num_neurons * (levels - 1) - jnp.sum(start) - 1e-6).astype(jnp.int64)
    taken = usable & (jnp.cumsum(usable) <= wanted)
    chosen = jnp.zeros(price.size, bool).at[order].set(taken)
    level = start + jnp.sum(chosen.reshape(num_neurons, -1), axis=1)
    return level.astype(jnp.int32), jnp.sum(taken) < wanted
