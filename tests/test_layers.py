"""The decoder's building blocks against NumPy in double precision."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY

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
