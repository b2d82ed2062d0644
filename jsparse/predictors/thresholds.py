"""Calibrated thresholds: how far each neuron's predicted score must rise before the neuron is computed.

Skipping neuron j on the tokens where its score is lowest costs the importance it had there. Thresholds sit on a grid
of quantile levels per neuron, and levels are raised one at a time, cheapest first (SVDP, arXiv 2603.14110).
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.errors import JsparseError
from jsparse.typing import Array, Float, Int

BiasMode = Literal["neuron", "layer", "none"]
SilencedRule = Literal["spare", "stop"]
_MAX_START = 0.95
_NEURON_BLOCK = 128
_MAX_SILENCED_SHARE = 0.01


@dataclasses.dataclass(frozen=True)
class BiasFit:
    """A calibrated bias and how it was reached.

    Attributes:
      bias: (F,) float32: minus the threshold score; +inf where a neuron is never skipped.
      stopped_early: whether the target was out of reach: all steps that the rule on silenced neurons allows were taken.
    """

    bias: Float[Array, "F"]
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
    return fit_bias(scores, importance, target, levels=levels, mode=mode, silenced=silenced).bias


def fit_bias(
    scores: Float[Array, "F n"],
    importance: Float[Array, "_ _"],
    target: float,
    *,
    levels: int = 256,
    mode: BiasMode = "neuron",
    silenced: SilencedRule = "spare",
) -> BiasFit:
    """`calibrate_bias`, with word of whether the target was reached."""
    if scores.shape != importance.shape:
        raise JsparseError(f"scores have shape {scores.shape} but importance has {importance.shape}")
    if not 0 <= target <= 1:
        raise JsparseError(f"the target sparsity is {target}; it must be between 0 and 1")
    if levels < 2:
        raise JsparseError(f"levels is {levels}; it must be at least 2")
    if mode == "none":
        return BiasFit(jnp.zeros(scores.shape[0]), False)
    if mode == "layer":
        return BiasFit(jnp.full(scores.shape[0], _layer_bias(scores, target)), False)
    thresholds, costs = level_costs(scores, importance, levels)
    level, early = raise_levels(costs, target, silenced=silenced)
    return BiasFit(-jnp.take_along_axis(thresholds, level[:, None], axis=1)[:, 0], early)


def _layer_bias(scores: Float[Array, "F n"], target: float) -> np.float32:
    """One constant for all neurons: minus the k-th smallest of all scores, k the target share of their number."""
    count = round(target * scores.size)
    if count == 0:
        return np.float32(np.inf)
    flat = np.array(scores, np.float32).reshape(-1)
    flat.partition(count - 1)
    return -flat[count - 1]


def level_costs(
    scores: Float[Array, "F n"], importance: Float[Array, "F n"], levels: int
) -> tuple[Float[Array, "F levels"], Float[Array, "F levels"]]:
    """Per neuron and level, the threshold score and the importance lost below it (float64).

    Level q skips the k = floor(q n / (levels - 1)) tokens of lowest score; its threshold is the k-th smallest score,
    -inf for k = 0. Tokens that share the threshold's score are skipped with it and charged to the level.
    """
    with jax.enable_x64(True):
        blocks = [
            _level_costs(
                jnp.asarray(scores[start : start + _NEURON_BLOCK], jnp.float32),
                jnp.asarray(importance[start : start + _NEURON_BLOCK], jnp.float32),
                levels,
            )
            for start in range(0, scores.shape[0], _NEURON_BLOCK)
        ]
        thresholds, costs = zip(*blocks)
        return jnp.concatenate(thresholds), jnp.concatenate(costs)


def raise_levels(
    costs: Float[Array, "F levels"], target: float, *, silenced: SilencedRule = "spare"
) -> tuple[Int[Array, "F"], bool]:
    """Run the greedy over the whole layer: every neuron's level, and whether it ended short of the target.

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
        return level, bool(early)


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
    key = packed >> 32
    last_tied = jax.vmap(lambda row: jnp.searchsorted(row, row[at], side="right"))(key) - 1
    none = skipped == 0
    return jnp.where(none, -jnp.inf, thresholds), jnp.where(none, 0.0, jnp.take_along_axis(lost, last_tied, axis=1))


def _sort_key(scores):
    """int32 whose order is the float32 scores' order."""
    bits = jnp.where(scores == 0, 0.0, scores).view(jnp.int32)  # -0.0 and 0.0 tie
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
