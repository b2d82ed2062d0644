"""The decoder's building blocks against NumPy in double precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import TINY

from jsparse.model.attention import attend
from jsparse.model.cache import SPARE_SLOTS, LayerCache
from jsparse.model.layers import Rotation, rotate, shrink_large_biases


@pytest.mark.parametrize("positions", [[[0, 1, 4095], [7, 500, 32767]], [[3, 4, 5]]])
def test_rotary_embedding(positions):
    """Pairs of features, half a head apart, turn like complex numbers; the angles are rounded to float32."""
    size, positions = 16, np.array(positions)
    config = dataclasses.replace(TINY, head_dim=size, rope_theta=1e6)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 4, size)))
    positions = np.broadcast_to(positions, (2, 3))
    cos, signed_sin = jax.jit(Rotation.of, static_argnames="config")(positions, config=config)
    found = np.asarray(rotate(x, cos, signed_sin), np.float64)
    angles = positions[..., None, None] * 1e6 ** (-2 * np.arange(size // 2) / size)
    turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angles)
    error = np.abs(found - np.concatenate([turned.real, turned.imag], axis=-1))
    assert np.all(error <= 4e-7 * np.abs(x).max() * (1 + positions[..., None, None]))


def test_large_key_biases_are_shrunk_and_products_stay_to_the_bit():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 3, heads, 16)), jnp.float32) for heads in (4, 2))
    bias = np.zeros((2, 16), np.float32)
    bias[0, 3], bias[0, 8], bias[1, 0] = -100, 7.9, 8
    scaled_q, scaled_k = shrink_large_biases(q, k + bias, jnp.asarray(bias.ravel()))
    ratio = np.asarray((k + bias) / scaled_k)
    expected = np.ones((2, 16))
    expected[0, [3, 11]] = 8  # with its partner in the rotary embedding; what is left of 100 is 12.5
    np.testing.assert_array_equal(ratio, np.broadcast_to(expected, ratio.shape))
    grouped = (np.asarray(x).reshape(2, 3, 2, 2, 16) for x in (q, scaled_q))
    before, after = (y * np.asarray(keys)[:, :, :, None] for y, keys in zip(grouped, (k + bias, scaled_k)))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("length", "window"), [(128, None), (300, None), (32, 20), (100, 20)])
def test_attention_of_many_tokens(length, window):
    """By blocks of queries, the last not full, over the wrap of a ring; the cache holds all that a block sees."""
    keys = jax.random.split(jax.random.key(0), 5)
    slots = length + 50 if window is None else window + SPARE_SLOTS
    q, k, v = (jax.random.normal(key, (2, length, heads, 8)) for key, heads in zip(keys, (4, 2, 2)))
    cache = LayerCache(*(jax.random.normal(key, (2, slots, 2, 8)) for key in keys[3:]))
    start = jnp.asarray([0, 50 if window is None else 99])
    count = jnp.asarray([length, length - 7])
    found, new = jax.jit(attend, static_argnames="window")(q, k, v, start, count, cache, window=window)
    expected, *sides = oracle.attend(q, k, v, start, count, cache, window)
    for row, exists in enumerate(count):
        np.testing.assert_allclose(found[row, :exists], expected[row, :exists], rtol=0, atol=1e-5)
    for side, wanted in zip((new.keys, new.values), sides):
        np.testing.assert_array_equal(np.asarray(side, np.float64), wanted)


def test_attention_holds_no_matrix_of_all_pairs_of_positions():
    length = 5000
    q, k, v = (jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1, 1))
    side, number = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    operands = q, k, v, number, number, LayerCache(side, side)
    compiled = jax.jit(attend, static_argnames="window").lower(*operands, window=None).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * length * length * 4 / 2
