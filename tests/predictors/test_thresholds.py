"""Calibrated thresholds against the step-by-step greedy."""

import jax
import numpy as np
import oracle
import pytest

from jsparse.errors import JsparseError
from jsparse.predictors.thresholds import calibrate_bias, level_costs, raise_levels


def problem(seed, num_neurons=40, num_tokens=120, kind="smooth"):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((num_neurons, num_tokens)).astype(np.float32) - 1
    gate = np.maximum(scores + 0.5 * rng.standard_normal(scores.shape), 0)
    importance = (gate**2).astype(np.float32)
    if kind == "ties":
        importance = np.round(importance * 2).astype(np.float32)
        scores = np.round(scores * 4).astype(np.float32) / 4
    if kind == "dead":
        importance[:4] = 0
    return scores, importance


@pytest.mark.parametrize("silenced", ["spare", "stop"])
@pytest.mark.parametrize("kind", ["smooth", "ties", "dead"])
@pytest.mark.parametrize("levels", [4, 33, 256])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.7, 0.9, 0.99, 1.0])
def test_thresholds_are_those_of_the_step_by_step_greedy(silenced, kind, levels, target):
    for seed in range(3):
        scores, importance = problem(seed, kind=kind)
        expected, early = oracle.calibrate_bias(scores, importance, target, levels, silenced)
        np.testing.assert_array_equal(
            calibrate_bias(scores, importance, target, levels=levels, silenced=silenced), expected
        )
        _, costs = level_costs(scores, importance, levels)
        assert raise_levels(costs, target, silenced=silenced)[1] == early


def test_the_problems_reach_both_endings():
    scores, importance = problem(0)
    assert not oracle.calibrate_bias(scores, importance, 0.7)[1]
    assert oracle.calibrate_bias(scores, importance, 1.0)[1]
    assert oracle.calibrate_bias(scores, importance, 0.99, silenced="stop")[1]


def test_the_bias_skips_the_target_share_at_less_cost_than_a_constant():
    scores, importance = problem(7, 300, 400)
    lost = {}
    for mode in ("neuron", "layer"):
        bias = np.asarray(calibrate_bias(scores, importance, 0.75, mode=mode))
        skipped = ~(scores + bias[:, None] > 0)
        assert abs(skipped.mean() - 0.75) < 0.01
        lost[mode] = importance[skipped].sum()
    assert lost["neuron"] < lost["layer"]
    np.testing.assert_array_equal(calibrate_bias(scores, importance, 0.75, mode="none"), 0)


def test_no_cost_is_paid_below_the_zero_cost_share():
    scores, _ = problem(3)
    importance = np.where(scores > 0, 1.0, 0.0).astype(np.float32)
    bias = np.asarray(calibrate_bias(scores, importance, 0.5))
    assert importance[~(scores + bias[:, None] > 0)].sum() == 0


def test_a_tie_is_charged_whole():
    """Skipping one of several tokens with the same score skips them all."""
    importance = np.where(np.arange(100) % 10 == 0, 5.0, 0.0).astype(np.float32)[None]
    thresholds, costs = level_costs(np.zeros((1, 100), np.float32), importance, 11)
    np.testing.assert_array_equal(costs[0], [0] + [50] * 10)
    np.testing.assert_array_equal(thresholds[0, 1:], 0)


def test_extreme_scores_keep_their_order():
    scores = np.array([[-np.float32(3e38), -1e-30, 0.0, 1e-30, 3e38, -5.0, 5.0]], np.float32)
    thresholds, costs = level_costs(scores, np.ones_like(scores), 8)
    np.testing.assert_array_equal(thresholds[0, 1:], np.sort(scores[0]))
    np.testing.assert_array_equal(costs[0], np.arange(8))


def test_it_is_array_code():
    """The greedy is one compiled program whatever the number of steps."""
    scores, importance = problem(0, 400, 200)
    costs = level_costs(scores, importance, 256)[1]
    raise_levels(costs, 0.5)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("jax._src.interpreters.pxla.logger.log", lambda *a, **k: compiled.append(a))
        raise_levels(costs, 0.9)
    assert not compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.5}, "target sparsity is 1.5"),
        ({"target": -0.1}, "target sparsity is -0.1"),
        ({"target": float("nan")}, "target sparsity is nan"),
        ({"target": 0.5, "levels": 1}, "levels is 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(JsparseError, match=message):
        calibrate_bias(*problem(0), **options)


def test_shapes_that_differ():
    with pytest.raises(JsparseError, match="importance has"):
        calibrate_bias(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32), 0.5)
