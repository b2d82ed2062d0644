"""The decoder's building blocks against NumPy in double precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import TINY

from jsparse.model.attention import causal_attention
from jsparse.model.layers import Rotation, rotate


@pytest.mark.parametrize("positions", [[[0, 1, 4095], [7, 500, 32767]], [[3, 4, 5]]])
def test_rotary_embedding(positions):
    """Pairs of features, half a head apart, turn like complex numbers; the angles are rounded to float32."""
    size, positions = 16, np.array(positions)
    config = dataclasses.replace(TINY, head_dim=size, rope_theta=1e6)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 4, size)))
    _, cos, signed_sin = jax.jit(Rotation.of, static_argnames="config")(positions, config=config)
    found = np.asarray(rotate(x, cos, signed_sin), np.float64)
    angles = positions[..., None, None] * 1e6 ** (-2 * np.arange(size // 2) / size)
    turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angles)
    error = np.abs(found - np.concatenate([turned.real, turned.imag], axis=-1))
    assert np.all(error <= 4e-7 * np.abs(x).max() * (1 + positions[..., None, None]))


@pytest.mark.parametrize(("length", "window"), [(512, None), (1024, 100), (700, None), (1100, 300)])
def test_attention_of_a_whole_sequence(length, window):
    """Of any length, by blocks of queries."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, heads, 8)) for key, heads in zip(keys, (2, 1, 1)))
    found = jax.jit(causal_attention, static_argnames="window")(q, k, v, window=window)
    for position in (0, 1, 511, length - 1):
        now = [np.asarray(side[:, position]) for side in (q, k, v)]
        expected, _ = oracle.attend(*now, np.array([position]), (k, v), window)
        np.testing.assert_allclose(found[:, position], expected, rtol=0, atol=1e-5)


def test_attention_holds_no_matrix_of_all_pairs_of_positions():
    length = 5000
    q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1, 1))
    compiled = jax.jit(causal_attention, static_argnames="window").lower(q, k, v, window=None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * length * length * 4 / 2
