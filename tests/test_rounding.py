"""Storages: their names, what rounding to them costs, and what they hold exactly."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jsparse
from jsparse.arrays import Storage, dequantize, storage_of, take_rows
from jsparse.rounding import cast, fit_codebook, quantize_groups, quantize_rows

UNIFORM = np.arange(-8, 8, dtype=np.int8)


def error(found, exact) -> float:
    """Share of the squares that is lost."""
    return float(np.sum((np.asarray(found) - exact) ** 2) / np.sum(np.asarray(exact) ** 2))


@pytest.mark.parametrize(("name", "bound"), [("int8", 1e-4), ("int4", 0.03), ("int4:32", 0.01)])
@pytest.mark.parametrize("columns", [33, 64])
def test_quantised_rows_round_trip(name, bound, columns):
    values, storage = jax.random.normal(jax.random.key(0), (50, columns)), Storage.parse(name)
    stored = cast(values, name)
    assert stored.shape == (50, columns)
    assert stored.values.shape == (50, storage.row_bytes(columns))
    assert storage_of(stored) == storage
    exact = oracle.matrix(stored)
    assert error(exact, values) < bound
    np.testing.assert_allclose(dequantize(stored), exact, rtol=1e-6)
    np.testing.assert_allclose(take_rows(stored, jnp.asarray([7, 50])), [exact[7], np.zeros(columns)], rtol=1e-6)
    assert cast(stored, name) is stored
    assert storage_of(cast(stored, "bfloat16")) == Storage("bfloat16")
    np.testing.assert_array_equal(dequantize(cast(jnp.zeros((50, columns)), name)), 0)


@pytest.mark.parametrize("name", ["int8", "int4", "int4:32"])
def test_what_cannot_be_rounded_is_refused(name):
    """One NaN would make the codebook, and with it the whole matrix, zero."""
    values = np.ones((4, 40), np.float32)
    for wrong in (np.nan, np.inf, -np.inf):
        values[2, 7] = wrong
        with pytest.raises(ValueError, match="it holds NaN or infinity"):
            cast(jnp.asarray(values), name)
    values[2, 7] = -1e9
    if name == "int4:32":
        with pytest.raises(ValueError, match=r"it holds 1.0e\+09, and int4:32 no more than 8.3e\+06"):
            cast(jnp.asarray(values), name)
    else:
        np.testing.assert_allclose(dequantize(cast(jnp.asarray(values), name))[2, 7], -1e9, rtol=0.2)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rounding_by_blocks_is_that_of_the_whole(name):
    values = jax.random.normal(jax.random.key(0), (50, 33))
    whole, blocks = quantize_rows(values, Storage(name)), cast(values, name)
    np.testing.assert_array_equal(blocks.values, whole.values)
    np.testing.assert_allclose(blocks.scale, whole.scale, rtol=1e-6)
    np.testing.assert_array_equal(quantize_rows(jnp.zeros((2, 8)), Storage(name)).scale, 1)


def test_blocks_of_q4_0_are_held_exactly():
    """Integers of -8 to 7 times a float16 scale, of either sign and subnormal too."""
    rng = np.random.default_rng(0)
    scale = rng.choice([2.0**-5, -(2.0**-5), 0.3, 3e-7, 2.0**-24, 100], (256, 8)).astype(np.float16)
    integers = rng.integers(-8, 8, (256, 256))
    integers[:, ::32] = -8
    values = integers * np.repeat(scale.astype(np.float32), 32, axis=1)
    stored = quantize_groups(jnp.asarray(values), UNIFORM)
    np.testing.assert_allclose(oracle.matrix(stored), values, rtol=0, atol=0)


def q4_0(values: np.ndarray) -> np.ndarray:
    """What llama.cpp's rounding to Q4_0 gives: the largest element of 32 becomes -8."""
    groups = values.reshape(-1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], axis=1)
    scale = (largest / -8).astype(np.float16).astype(np.float32)
    return (np.clip(np.round(groups / scale), -8, 7) * scale).reshape(values.shape)


@pytest.mark.parametrize("heavy", [False, True])
def test_int4_loses_a_quarter_less_than_q4_0(heavy):
    rng = np.random.default_rng(0)
    values = (rng.standard_t(5, (256, 256)) if heavy else rng.standard_normal((256, 256))).astype(np.float32)
    stored = cast(jnp.asarray(values), "int4:32")
    assert error(dequantize(stored), values) < 0.78 * error(q4_0(values), values)
    uniform = quantize_groups(jnp.asarray(values), UNIFORM)
    assert error(dequantize(stored), values) < 0.87 * error(dequantize(uniform), values)
    assert error(dequantize(uniform), values) < 0.92 * error(q4_0(values), values)


def test_a_codebook_is_fitted_to_what_it_rounds():
    rng = np.random.default_rng(0)
    levels = np.sort(rng.choice(np.arange(-120, 120), 16, replace=False))
    levels[0] = -127
    values = (rng.choice(levels, (400, 64)) / 127).astype(np.float32)
    values[:, ::32] = -1
    fitted = quantize_groups(jnp.asarray(values), fit_codebook(values))
    normal = fit_codebook(rng.standard_normal((400, 64)).astype(np.float32))
    assert error(dequantize(fitted), values) < 0.3 * error(
        dequantize(quantize_groups(jnp.asarray(values), normal)), values
    )
    found = np.asarray(fit_codebook(jnp.zeros((256, 256))))
    assert np.all(np.diff(found) > 0)


@pytest.mark.parametrize("text", ["float32", "bfloat16", "float16", "int8", "int4", "int4:32"])
def test_storages_are_named(text):
    storage = Storage.parse(text)
    assert str(storage) == text
    assert storage.bits == {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}[storage.dtype]
    assert storage.is_low_bit == text.startswith("int")
    assert storage.row_bytes(33) == {"int8": 33, "int4": 17, "int4:32": 21}.get(text, 33 * storage.bits // 8)


WRONG = [
    "int3",
    "float32:4",
    "int4:0",
    "int4:",
    "int4:-1",
    "int4:x",
    "int4:32:32",
    "int4:032",
    "int4:64",
    "int8:32",
    "",
]


@pytest.mark.parametrize("text", [*WRONG, "", None, 8])
def test_what_is_no_storage_is_refused(text):
    with pytest.raises(jsparse.JsparseError, match=re.escape(f"a matrix cannot be stored in {text!r}; known are")):
        Storage.parse(text)


def test_floats_are_no_quantised_rows():
    with pytest.raises(ValueError, match="storage is float32; quantised rows with one scale have 8 or 4 bits"):
        quantize_rows(jnp.zeros((2, 3)), Storage("float32"))
