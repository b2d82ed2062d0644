"""The truncation-aware SVD and its low-bit form."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jsparse.errors import JsparseError
from jsparse.predictors.svd import fit_low_bit, fit_svd

WIDTH, NEURONS = 96, 256


def data(num_tokens=600, seed=0):
    """Correlated activations (n, D), float64, with a mean and channels a thousand times larger than the others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_tokens, WIDTH)) @ (np.eye(WIDTH) + 0.5 * rng.standard_normal((WIDTH, WIDTH)))
    return (x + 0.5) * np.where(np.arange(WIDTH) % 31 == 3, 1e3, 1.0), rng.standard_normal((NEURONS, WIDTH))


def fit64(gate, gram, rank, **options):
    with jax.enable_x64(True):
        a, b = fit_svd(jnp.asarray(gate), jnp.asarray(gram), rank, **options)
        return np.asarray(a), np.asarray(b)


@pytest.mark.parametrize("rank", [1, 6, 24, 48, 95])
def test_whitened_error_is_the_tail_of_the_singular_values(rank):
    x, gate = data()
    a, b = fit64(gate, x.T @ x, rank)
    singular = np.linalg.svd(gate @ np.linalg.cholesky(x.T @ x), compute_uv=False)
    error = np.linalg.norm(x @ gate.T - x @ a.T @ b.T) ** 2
    np.testing.assert_allclose(error, np.sum(singular[rank:] ** 2), rtol=1e-6)


def test_whitening_beats_plain_svd_and_plain_svd_is_the_svd():
    x, gate = data()
    a, b = fit64(gate, x.T @ x, 12, whiten=False)
    u, s, vt = np.linalg.svd(gate, full_matrices=False)
    np.testing.assert_allclose(b @ a, (u[:, :12] * s[:12]) @ vt[:12], atol=1e-9)
    wa, wb = fit64(gate, x.T @ x, 12)
    error = [np.linalg.norm(x @ gate.T - x @ p.T @ q.T) for p, q in ((a, b), (wa, wb))]
    assert error[1] < 0.5 * error[0]


@pytest.mark.parametrize("damage", ["few tokens", "dead channel", "twin channels", "all zero"])
def test_singular_gram(damage):
    x, gate = data(num_tokens=10 if damage == "few tokens" else 600)
    if damage == "dead channel":
        x[:, 5] = 0
    if damage == "twin channels":
        x[:, 6] = x[:, 5]
    if damage == "all zero":
        x[:] = 0
    gram = x.T @ x
    a, b = fit64(gate, gram, 24)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    best = np.sum(np.linalg.svd(x @ gate.T, compute_uv=False)[24:] ** 2)
    assert np.linalg.norm(x @ gate.T - x @ a.T @ b.T) ** 2 <= best * (1 + 1e-6) + 1e-9 * np.sum((x @ gate.T) ** 2)
    for bits in (16, 8, 4):
        a, b, offset = fit_low_bit(gate, x, 24, bits=bits)
        assert np.isfinite(oracle.matrix(a)).all()
        assert np.isfinite(oracle.matrix(b)).all()
        assert np.isfinite(offset).all()


def estimate_error(x, target, a, b, offset):
    estimate = x @ oracle.matrix(a).T @ oracle.matrix(b).T + np.asarray(offset, np.float64)
    return np.linalg.norm(estimate - target) / np.linalg.norm(target - target.mean(axis=0))


def clipped(value, threshold=0.0):
    """The refit's target: at least half a deviation under the mean, and never clipped above the threshold."""
    return np.maximum(value, np.minimum(value.mean(axis=0), threshold) - 0.5 * value.std(axis=0))


def scaled_data(num_tokens=4000):
    x, gate = data(num_tokens)
    return x / x.std(axis=0), gate


def test_more_bits_are_better_and_the_refit_recovers_what_rounding_a_loses():
    x, gate = scaled_data()
    target = clipped(x @ gate.T)
    fits = {bits: fit_low_bit(gate, x, 48, bits=bits) for bits in (16, 8, 4)}
    errors = [estimate_error(x, target, *fits[bits]) for bits in (16, 8, 4)]
    assert errors[0] <= errors[1] < errors[2]
    kept = fit_low_bit(gate, x, 48, bits=4, refit=False)
    np.testing.assert_array_equal(kept[0].values, fits[4][0].values)
    # Even with the best slope and intercept for each neuron the SVD's weights are further off.
    score = x @ oracle.matrix(kept[0]).T @ oracle.matrix(kept[1]).T
    score, centred = score - score.mean(axis=0), target - target.mean(axis=0)
    score *= (score * centred).sum(axis=0) / (score**2).sum(axis=0)
    assert errors[2] < np.linalg.norm(score - centred) / np.linalg.norm(centred)


def test_the_refit_is_the_least_squares_fit_of_the_clipped_gate():
    x, gate = scaled_data()
    for threshold in (0.0, -50.0):
        a, b, offset = fit_low_bit(gate, x, 48, bits=16, threshold=threshold)
        features = np.column_stack([x @ oracle.matrix(a).T, np.ones(len(x))])
        target = clipped(x @ gate.T, threshold)
        best, *_ = np.linalg.lstsq(features, target)
        error = np.linalg.norm(features @ best - target) / np.linalg.norm(target - target.mean(axis=0))
        assert estimate_error(x, target, a, b, offset) < 1.001 * error


def test_centring_moves_the_mean_into_the_offset():
    x, gate = data()
    x = x / x.std(axis=0) + 20
    target = clipped(x @ gate.T)
    centred, raw = (fit_low_bit(gate, x, 24, bits=16, center=center) for center in (True, False))
    assert estimate_error(x, target, *centred) < estimate_error(x, target, *raw)
    np.testing.assert_array_equal(raw[2], 0)


def test_no_matrix_of_neurons_by_neurons_is_formed():
    gate, gram = jnp.zeros((NEURONS * 8, WIDTH)), jnp.eye(WIDTH)
    text = str(jax.make_jaxpr(lambda g, m: fit_svd(g, m, 8))(gate, gram))
    assert f"{NEURONS * 8},{WIDTH}" in text
    assert f"{NEURONS * 8},{NEURONS * 8}" not in text


@pytest.mark.parametrize("rank", [0, -1, WIDTH + 1])
def test_rank_out_of_range(rank):
    with pytest.raises(JsparseError, match=f"rank is {rank}"):
        fit_svd(jnp.zeros((NEURONS, WIDTH)), jnp.eye(WIDTH), rank)


def test_wrong_shapes_and_bits():
    with pytest.raises(JsparseError, match="gram has shape"):
        fit_svd(jnp.zeros((NEURONS, WIDTH)), jnp.eye(WIDTH + 1), 4)
    with pytest.raises(JsparseError, match="bits is 5"):
        fit_low_bit(jnp.zeros((NEURONS, WIDTH)), np.ones((5, WIDTH)), 4, bits=5)
