"""One suite for every FFN executor: the function of the float64 oracle, on the executor's own path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import simulated_npu

from jsparse.arrays import QuantizedRows, quantize_rows
from jsparse.executors.npu import Npu
from jsparse.executors.select import EXECUTORS, make_executor, select_executor, unavailable
from jsparse.model.ffn import KINDS, FFNSpec
from jsparse.model.weights import FFNWeights, Linear, Predictor

DENSE_FFNS = [*KINDS.items(), ("without up", FFNSpec("relu", up=None))]
SPARSE_FFNS = [
    (f"{name}-{pipeline}", dataclasses.replace(spec, pipeline=pipeline))
    for name, spec in DENSE_FFNS
    if spec.has_zeros
    for pipeline in ("sequential", "parallel")
]


def by_name(ffns):
    return pytest.mark.parametrize(("name", "spec"), [pytest.param(*ffn, id=ffn[0]) for ffn in ffns])


TOLERANCE = 1e-5
"""Relative to the largest output, float32 arithmetic against float64 on the same stored weights."""


ROUNDED = 1e-2
"""The same where products are taken in 16 bits."""
STAND_INS = {"cuda, interpreted": None, "cann, on PyTorch's CPU": "cpu", "cann, on a simulated NPU": "npu"}
"""Executors without their device, and PyTorch's device where they have one."""


@pytest.fixture(
    params=[*(pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in EXECUTORS), *STAND_INS]
)
def executor(request):
    """Every executor that can run here, and those that need a device interpreted or on a stand-in for it."""
    name = request.param.partition(",")[0]
    reason = unavailable(name)
    if request.param not in STAND_INS:
        if reason:
            pytest.skip(f"executor {name}: {reason}")
        return by_callback(select_executor(name))
    if reason is None:
        pytest.skip(f"executor {name} runs here itself")
    executor = by_callback(make_executor(name))
    if device := STAND_INS[request.param]:
        simulated_npu.install()
        executor = dataclasses.replace(executor, device=device)
    return executor


def by_callback(executor):
    """The executor that has FFNs to call: an NPU's, which else takes the whole loop."""
    return dataclasses.replace(executor, whole=False) if isinstance(executor, Npu) else executor


def tolerance(executor, storage: str) -> float:
    """Of an FFN's output whose weights are stored so."""
    if not isinstance(executor, Npu) or storage == "float32":
        return TOLERANCE
    return TOLERANCE if storage == "int8" and executor.device == "cpu" else ROUNDED


def storage_of(matrix) -> str:
    return str((matrix.values if isinstance(matrix, QuantizedRows) else matrix).dtype)


def sparse_ffn(executor, x, ffn, predictor, spec):
    if isinstance(executor, Npu):
        ffn, predictor = executor.place_ffn(ffn), executor.place_predictor(predictor)
    return jax.jit(executor.sparse_ffn, static_argnames="spec")(x, ffn, predictor, spec=spec)


def problem(
    *,
    batch=3,
    width=96,
    neurons=300,
    rank=24,
    bits=16,
    storage="float32",
    predicted="some",
    name="reglu",
    spec=KINDS["reglu"],
    seed=0,
):
    """x, weights and predictor; neurons is no multiple of any block size, and an odd rank ends in half a byte.

    Of FATReLU, every neuron has a threshold of its own.
    """
    keys = jax.random.split(jax.random.key(seed), 7)

    def store(matrix):
        return quantize_rows(matrix, 8) if storage == "int8" else matrix.astype(storage)

    gate, up, down_t = (store(jax.random.normal(key, (neurons, width))) for key in keys[:3])
    a, b = jax.random.normal(keys[3], (rank, width)), jax.random.normal(keys[4], (neurons, rank))
    a, b = (m.astype(jnp.bfloat16) if bits == 16 else quantize_rows(m, bits) for m in (a, b))
    x = jax.random.normal(keys[6], (batch, width))
    # Of some thresholds for each neuron the one that is farthest from any score: rounding must not decide.
    scores = np.asarray(x, np.float64) @ oracle.matrix(a).T @ oracle.matrix(b).T
    some = np.asarray(60 * jax.random.normal(keys[5], (50, neurons)))
    farthest = np.abs(scores[:, None] + some).min(axis=0).argmax(axis=0)
    bias = {
        "none": jnp.full(neurons, -jnp.inf),
        "some": jnp.asarray(some[farthest, np.arange(neurons)]),
        "all": jnp.full(neurons, jnp.inf),
    }[predicted]
    threshold = jnp.linspace(0.1, 0.5, neurons) if name.startswith("fatrelu") else jnp.zeros(neurons)
    return x, FFNWeights(gate, None if spec.up is None else up, down_t, threshold), Predictor(a, b, bias)


def check(executor, x, ffn, predictor, spec):
    y, counts = sparse_ffn(executor, x, ffn, predictor, spec)
    expected, expected_counts = oracle.ffn(x, ffn, predictor, spec)
    allowed = tolerance(executor, storage_of(ffn.gate))
    np.testing.assert_array_equal(counts[:, 0], expected_counts[:, 0])
    # With 16 bits a gate or an up next to zero may fall on its other side.
    np.testing.assert_allclose(counts[:, 1], expected_counts[:, 1], rtol=0, atol=0 if allowed == TOLERANCE else 3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=allowed * max(1.0, np.abs(expected).max()))
    return counts


@by_name(SPARSE_FFNS)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("predicted", ["none", "some", "all"])
def test_sparse_ffn_is_the_ffn_of_the_predicted_neurons(executor, name, spec, bits, batch, predicted):
    counts = check(executor, *problem(batch=batch, bits=bits, predicted=predicted, name=name, spec=spec), spec)
    shares = np.asarray(counts)[:, 0] / 300
    assert {"none": (shares == 0), "some": (shares > 0.2) & (shares < 0.8), "all": (shares == 1)}[predicted].all()


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("predicted", ["none", "some", "all"])
@pytest.mark.parametrize(("batch", "bits"), [(1, 4), (8, 16), (11, 8)])
def test_sparse_ffn_on_stored_weights(executor, storage, predicted, batch, bits):
    spec = dataclasses.replace(KINDS["drelu"], pipeline="parallel" if batch == 8 else "sequential")
    check(executor, *problem(storage=storage, predicted=predicted, batch=batch, bits=bits), spec)


@pytest.mark.parametrize(("width", "neurons", "rank"), [(8, 1, 1), (33, 127, 7), (64, 128, 1), (31, 257, 31)])
def test_sparse_ffn_at_odd_shapes(executor, width, neurons, rank):
    for bits in (16, 8, 4):
        check(executor, *problem(width=width, neurons=neurons, rank=rank, bits=bits), KINDS["reglu"])


@by_name(DENSE_FFNS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("tokens", [(1,), (3,), (2, 40), (600,)])
def test_dense_ffn_is_the_ffn_of_all_neurons(executor, name, spec, storage, tokens):
    """Of a decode step and of a prefill, which executors may compute in different ways."""
    x, ffn, _ = problem(batch=int(np.prod(tokens)), storage=storage, name=name, spec=spec)
    expected, _ = oracle.ffn(x, ffn, None, spec)
    allowed = tolerance(executor, storage)
    if isinstance(executor, Npu):
        ffn = executor.place_ffn(ffn)
    y = executor.dense_ffn(x.reshape(*tokens, -1), ffn, spec)
    assert y.shape == (*tokens, x.shape[-1])
    expected = expected.reshape(y.shape)
    np.testing.assert_allclose(y, expected, rtol=0, atol=allowed * np.abs(expected).max())


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize(("tokens", "width"), [((), 96), ((1,), 33), ((8,), 96), ((2, 40), 31), ((600,), 96)])
def test_project(executor, storage, tokens, width):
    count = int(np.prod(tokens))
    x, ffn, _ = problem(batch=count, width=width, storage="float32" if storage == "int4" else storage)
    weights = [quantize_rows(m, 4) if storage == "int4" else m for m in (ffn.gate, ffn.up)]
    bias = jnp.arange(ffn.gate.shape[0], dtype=jnp.float32) / 64
    first, second = map(Linear, weights)
    with_bias = dataclasses.replace(second, bias=bias)
    outs = executor.project(x.reshape(*tokens, width), [first, with_bias])
    outs = (*outs, *executor.project(x.reshape(*tokens, width), [second]))
    for linear, out in zip((first, with_bias, second), outs):
        expected = np.asarray(x, np.float64) @ oracle.matrix(linear.rows).T
        expected = (expected + (0 if linear.bias is None else np.asarray(bias))).reshape(*tokens, -1)
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("width", [96, 31])
def test_rows(executor, storage, width):
    _, ffn, _ = problem(width=width, storage="float32" if storage == "int4" else storage)
    matrix = quantize_rows(ffn.gate, 4) if storage == "int4" else ffn.gate
    found = jax.jit(executor.rows)(matrix, jnp.asarray([7, 0, 299, 7, 300, 2**31 - 1], jnp.int32))
    expected = np.concatenate([oracle.matrix(matrix)[[7, 0, 299, 7]], np.zeros((2, width))])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "slots", "window"),
    [(4, 4, 64, 200, None), (6, 2, 128, 96, 96), (4, 2, 10, 70, 33), (7, 1, 128, 300, None), (12, 2, 64, 70, None)],
)
def test_attend(executor, dtype, heads, kv_heads, head_dim, slots, window):
    """A token in an unfilled cache, and one in a ring buffer that has gone round."""
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (2, heads, head_dim))
    k, v = (jax.random.normal(key, (2, kv_heads, head_dim)).astype(dtype).astype(jnp.float32) for key in keys[1:3])
    cache = tuple(jax.random.normal(key, (2, slots, kv_heads, head_dim)).astype(dtype) for key in keys[3:])
    position = jnp.asarray([5, slots + 31], jnp.int32)
    out, new_cache = jax.jit(executor.attend, static_argnames="window")(q, k, v, position, cache, window=window)
    expected, expected_cache = oracle.attend(q, k, v, position, cache, window)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)
    for side, wanted in zip(new_cache, expected_cache):
        assert side.dtype == dtype
        np.testing.assert_array_equal(np.asarray(side, np.float64), wanted)


def test_a_damaged_key_does_not_hide(executor):
    """NaN at the newest position, alone in its block of 64 slots, comes out as NaN."""
    cache = tuple(jnp.zeros((1, 128, 2, 64), jnp.bfloat16) for _ in range(2))
    ones = jnp.ones((1, 2, 64))
    attend = jax.jit(executor.attend, static_argnames="window")
    out, _ = attend(ones, jnp.nan * ones, ones, jnp.array([64], jnp.int32), cache, window=None)
    assert np.isnan(np.asarray(out)).all()


def test_sparse_ffn_reads_no_row_that_is_not_predicted(executor):
    """Rows of neurons that are not predicted hold NaN: one that is read, or a masked dense product, would show."""
    x, ffn, predictor = problem(batch=1)
    scores = np.asarray(x, np.float64) @ oracle.matrix(predictor.a).T @ oracle.matrix(predictor.b).T
    keep = jnp.asarray(scores[0] + np.asarray(predictor.bias) > 0)[:, None]
    for _, spec in SPARSE_FFNS:
        up = None if spec.up is None else ffn.up
        matrices = (None if m is None else jnp.where(keep, m, jnp.nan) for m in (ffn.gate, up, ffn.down_t))
        y, _ = sparse_ffn(executor, x, FFNWeights(*matrices, ffn.threshold), predictor, spec)
        expected, _ = oracle.ffn(x, dataclasses.replace(ffn, up=up), predictor, spec)
        np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_quantised_rows_round_trip():
    values = jax.random.normal(jax.random.key(0), (50, 33))
    for bits, bound in ((8, 0.01), (4, 0.2)):
        stored = quantize_rows(values, bits)
        assert stored.shape == (50, 33)
        error = np.linalg.norm(oracle.matrix(stored) - np.asarray(values)) / np.linalg.norm(values)
        assert error < bound
    assert quantize_rows(jnp.zeros((2, 3)), 4).scale.tolist() == [1.0, 1.0]
    assert isinstance(quantize_rows(values, 4), QuantizedRows)
    with pytest.raises(ValueError, match="bits is 3"):
        quantize_rows(values, 3)
