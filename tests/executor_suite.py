"""The suite that every executor passes: the function of the float64 oracle, on the executor's own path."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jsparse.arrays import Rows, Storage
from jsparse.executors.npu import Npu
from jsparse.model.cache import KV_DTYPES, SPARE_SLOTS, LayerCache
from jsparse.model.ffn import KINDS, FFNSpec
from jsparse.model.weights import FFNWeights, Linear, Predictor
from jsparse.rounding import quantize_groups, quantize_rows

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
INTEGERS = 1e-4
"""The same where low-bit weights meet vectors rounded to 16 bits, one step per vector."""
ROUNDED = 1e-2
"""The same where products are taken in floats of 16 bits."""
PREDICTED = ("none", "some", "all")


def tolerance(executor, storage: str) -> float:
    """Of the product with a matrix stored so, and of an FFN's output."""
    low_bit = storage in ("int8", "uint8") or storage.startswith("int4")
    if low_bit and executor.name == "cpu":
        return INTEGERS
    if not isinstance(executor, Npu) or storage == "float32":
        return TOLERANCE
    return TOLERANCE if low_bit and executor.device == "cpu" else ROUNDED


def storage_of(matrix) -> str:
    return str((matrix.values if isinstance(matrix, Rows) else matrix).dtype)


@partial(jax.jit, static_argnames=("executor", "spec"))
def _sparse_ffn(x, ffn, predictor, route, *, executor, spec):
    return executor.sparse_ffn(x, ffn, predictor, spec, route)


@partial(jax.jit, static_argnames=("executor", "spec"))
def _dense_ffn(x, ffn, *, executor, spec):
    return executor.dense_ffn(x, ffn, spec)


@partial(jax.jit, static_argnames="executor")
def _project(x, linears, *, executor):
    return executor.project(x, linears)


@partial(jax.jit, static_argnames=("executor", "window"))
def _attend(q, k, v, start, count, cache, *, executor, window):
    return executor.attend(q, k, v, start, count, cache, window)


def sparse_ffn(executor, x, ffn, predictor, spec, route=None):
    """The executor's, by one program for all operands of the same shapes."""
    if isinstance(executor, Npu):
        ffn, predictor = executor.place_ffn(ffn), executor.place_predictor(predictor)
    return _sparse_ffn(x, ffn, predictor, route, executor=executor, spec=spec)


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

    Of FATReLU, every neuron has a threshold of its own. All are drawn by NumPy: JAX would compile for every shape.
    """
    draw = normal(seed)
    gate, up, down_t = (store(draw(neurons, width), storage) for _ in range(3))
    low_bit = "bfloat16" if bits == 16 else f"int{bits}"
    a, b = store(draw(rank, width), low_bit), store(draw(neurons, rank), low_bit)
    x = draw(batch, width)
    scores = np.asarray(x, np.float64) @ oracle.matrix(a).T @ oracle.matrix(b).T
    bias = {
        "none": np.full(neurons, -np.inf, np.float32),
        "some": -farthest(scores, 60 * draw(50, neurons)),
        "all": np.full(neurons, np.inf, np.float32),
    }[predicted]
    threshold = np.zeros(neurons)
    if name.startswith("fatrelu"):
        gates = np.asarray(x, np.float64) @ oracle.matrix(gate).T
        threshold = farthest(gates, np.linspace(np.full(neurons, 0.1), 0.5, 50))
    ffn = FFNWeights(gate, None if spec.up is None else up, down_t, jnp.asarray(threshold, jnp.float32))
    return jnp.asarray(x), ffn, Predictor(a, b, jnp.asarray(bias))


def farthest(values: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Choose for each neuron the candidate (n, F) that is farthest from its values (B, F): rounding must not decide."""
    best = np.abs(values[:, None] - candidates).min(axis=0).argmax(axis=0)
    return candidates[best, np.arange(candidates.shape[1])]


def normal(seed: int):
    """Return a function that draws normal float32 arrays of a shape."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.standard_normal(shape, np.float32)


_quantize = jax.jit(quantize_rows, static_argnums=1)
_quantize_groups = jax.jit(quantize_groups)
_CODEBOOK = jnp.asarray([-127, -94, -75, -59, -45, -32, -18, -5, 8, 20, 33, 45, 59, 74, 91, 114], jnp.int8)


def store(values: np.ndarray, storage: str):
    """Store a matrix as the storage says, without compiling anything for floats."""
    if storage == "int4:32":
        return _quantize_groups(values, _CODEBOOK)
    if storage.startswith("int"):
        return _quantize(values, Storage.parse(storage))
    return jnp.asarray(values.astype(storage))


def make_cache(keys: np.ndarray, values: np.ndarray, dtype: str) -> LayerCache:
    """A cache that holds these (B, S, K, H), rounded to its dtype."""
    if dtype != "int8":
        return LayerCache(store(keys, dtype), store(values, dtype))
    (keys, key_scale), (values, value_scale) = oracle.quantize_heads(keys), oracle.quantize_heads(values)
    return LayerCache(*map(jnp.asarray, (keys, values, key_scale, value_scale)))


def check(executor, x, ffn, predictor, spec):
    y, counts = sparse_ffn(executor, x, ffn, predictor, spec)
    expected, expected_counts = oracle.ffn(x, ffn, predictor, spec)
    allowed = tolerance(executor, storage_of(ffn.gate))
    np.testing.assert_array_equal(counts[:, 0], expected_counts[:, 0])
    # With 16 bits a gate or an up next to zero may fall on its other side.
    np.testing.assert_allclose(counts[:, 1], expected_counts[:, 1], rtol=0, atol=0 if allowed == TOLERANCE else 3)
    np.testing.assert_allclose(y, expected, rtol=0, atol=allowed * max(1.0, np.abs(expected).max()))
    return counts


STORAGES = ("float32", "bfloat16", "float16", "int8", "int4:32")
TOKENS = ((1,), (3,), (2, 40), (600,))
BITS, BATCHES = (16, 8, 4), (1, 3)
STORED_WITH = ((1, 4), (8, 16), (11, 8))
"""Batch, and bits of the predictor."""


def is_one_of_each(test: str, params: dict) -> bool:
    """Whether a suite that compiles slowly runs this case in `make test`, which leaves the others to `make test-all`.

    It runs every FFN and storage, and every pair of bits and batch, or of storage and number of tokens, with one of the
    others.
    """
    if test == "test_sparse_ffn_is_the_ffn_of_the_predicted_neurons":
        i = [name for name, _ in SPARSE_FFNS].index(params["name"])
        return (params["bits"], params["batch"]) == (BITS[i % 3], BATCHES[i // 3 % 2])
    if test == "test_dense_ffn_is_the_ffn_of_all_neurons":
        i = [name for name, _ in DENSE_FFNS].index(params["name"])
        return TOKENS.index(params["tokens"]) == (i + STORAGES.index(params["storage"])) % 4
    if test == "test_sparse_ffn_on_stored_weights":
        return (params["batch"], params["bits"]) == STORED_WITH[STORAGES.index(params["storage"]) % 3]
    if test == "test_int4_groups_of_any_scale_meet_channels_of_any_size":
        return params["width"] % 2 == 1
    return True


class ExecutorSuite:
    """The tests of an executor, which a subclass makes."""

    compiles_slowly = False
    """Whether `make test` runs no more than `is_one_of_each` says."""

    def make(self):
        """The executor."""
        raise NotImplementedError

    @pytest.fixture
    def executor(self):
        return self.make()

    @by_name(SPARSE_FFNS)
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("batch", BATCHES)
    def test_sparse_ffn_is_the_ffn_of_the_predicted_neurons(self, executor, name, spec, bits, batch):
        for predicted in PREDICTED:
            counts = check(executor, *problem(batch=batch, bits=bits, predicted=predicted, name=name, spec=spec), spec)
            shares = np.asarray(counts)[:, 0] / 300
            expected = {"none": shares == 0, "some": (shares > 0.2) & (shares < 0.8), "all": shares == 1}[predicted]
            assert expected.all(), predicted

    @pytest.mark.parametrize("storage", ["bfloat16", "float16", "int8", "int4:32"])
    @pytest.mark.parametrize(("batch", "bits"), STORED_WITH)
    @pytest.mark.parametrize("predicted", PREDICTED)
    def test_sparse_ffn_on_stored_weights(self, executor, storage, batch, bits, predicted):
        spec = dataclasses.replace(KINDS["drelu"], pipeline="parallel" if batch == 8 else "sequential")
        check(executor, *problem(storage=storage, predicted=predicted, batch=batch, bits=bits), spec)

    @pytest.mark.parametrize(("width", "neurons", "rank"), [(8, 1, 1), (33, 127, 7), (64, 128, 1), (31, 257, 31)])
    @pytest.mark.parametrize("bits", BITS)
    def test_sparse_ffn_at_odd_shapes(self, executor, width, neurons, rank, bits):
        check(executor, *problem(width=width, neurons=neurons, rank=rank, bits=bits), KINDS["reglu"])

    @by_name(DENSE_FFNS)
    @pytest.mark.parametrize("storage", STORAGES)
    @pytest.mark.parametrize("tokens", TOKENS)
    def test_dense_ffn_is_the_ffn_of_all_neurons(self, executor, name, spec, storage, tokens):
        """Of a decode step and of a prefill, which executors may compute in different ways."""
        x, ffn, _ = problem(batch=int(np.prod(tokens)), storage=storage, name=name, spec=spec)
        expected, _ = oracle.ffn(x, ffn, None, spec)
        allowed = tolerance(executor, storage)
        if isinstance(executor, Npu):
            ffn = executor.place_ffn(ffn)
        y = _dense_ffn(x.reshape(*tokens, -1), ffn, executor=executor, spec=spec)
        assert y.shape == (*tokens, x.shape[-1])
        expected = expected.reshape(y.shape)
        np.testing.assert_allclose(y, expected, rtol=0, atol=allowed * np.abs(expected).max())

    @pytest.mark.parametrize("storage", [*STORAGES, "int4"])
    @pytest.mark.parametrize(("tokens", "width"), [((), 96), ((1,), 33), ((8,), 96), ((2, 40), 31), ((600,), 96)])
    def test_project(self, executor, storage, tokens, width):
        count = int(np.prod(tokens))
        x, ffn, _ = problem(batch=count, width=width, storage=storage)
        first, second = Linear(ffn.gate), Linear(ffn.up)
        bias = jnp.asarray(np.arange(ffn.gate.shape[0], dtype=np.float32) / 64)
        with_bias = dataclasses.replace(second, bias=bias)
        outs = _project(x.reshape(*tokens, width), [first, with_bias], executor=executor)
        outs = (*outs, *_project(x.reshape(*tokens, width), [second], executor=executor))
        for linear, out in zip((first, with_bias, second), outs):
            expected = np.asarray(x, np.float64) @ oracle.matrix(linear.rows).T
            expected = (expected + (0 if linear.bias is None else np.asarray(bias))).reshape(*tokens, -1)
            allowed = tolerance(getattr(executor, "host", executor), storage)
            np.testing.assert_allclose(out, expected, rtol=0, atol=allowed * np.abs(expected).max())

    @pytest.mark.parametrize("width", [96, 33])
    def test_int4_groups_of_any_scale_meet_channels_of_any_size(self, executor, width):
        """Two channels at 300 times the others' size; scales that are subnormal in float16, negative, and zero; to 1e-3
        of the output's root mean square."""
        spec, allowed = KINDS["reglu"], 1e-3 if not isinstance(executor, Npu) or executor.device == "cpu" else ROUNDED
        x, _, predictor = problem(batch=3, width=width, bits=4, predicted="all")
        x = x.at[:, jnp.asarray([2, width - 1])].multiply(300)
        draw = normal(5)
        sizes = np.repeat(np.exp2(np.arange(300) % 5 * -6.0), width).reshape(300, width).astype(np.float32)
        sizes[::7, :32] = 0
        matrices = [store(draw(300, width) * factor, "int4:32") for factor in (1, sizes, 1)]
        ffn = FFNWeights(*matrices, jnp.zeros(300))
        expected, _ = oracle.ffn(x, ffn, None, spec)
        for y in (
            sparse_ffn(executor, x, ffn, predictor, spec)[0],
            _dense_ffn(x, executor.place_ffn(ffn) if isinstance(executor, Npu) else ffn, executor=executor, spec=spec),
        ):
            assert np.abs(y - expected).max() < allowed * np.sqrt(np.mean(expected**2))

    @pytest.mark.parametrize("storage", [*STORAGES, "int4"])
    @pytest.mark.parametrize("width", [96, 31])
    def test_rows(self, executor, storage, width):
        matrix = problem(width=width, storage=storage)[1].gate
        found = jax.jit(executor.rows)(matrix, jnp.asarray([7, 0, 299, 7, 300, 2**31 - 1], jnp.int32))
        expected = np.concatenate([oracle.matrix(matrix)[[7, 0, 299, 7]], np.zeros((2, width))])
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    @pytest.mark.parametrize("dtype", KV_DTYPES)
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "head_dim", "slots", "window"),
        [(4, 4, 64, 200, None), (6, 2, 128, 96, 96), (4, 2, 10, 70, 33), (7, 1, 128, 300, None), (12, 2, 64, 70, None)],
    )
    def test_attend(self, executor, dtype, heads, kv_heads, head_dim, slots, window):
        """A token in an unfilled cache, one in a ring buffer that has gone round, and an idle sequence."""
        start, count = jnp.asarray([5, slots + 31, 7], jnp.int32), jnp.asarray([1, 1, 0], jnp.int32)
        self.check_attend(executor, dtype, (heads, kv_heads, head_dim, slots, window), start, count, 1)

    @pytest.mark.parametrize("tokens", [2, 40])
    def test_attend_takes_several_tokens(self, executor, tokens):
        """Of ragged number, from any start, over the wrap of a ring."""
        start, count = jnp.asarray([0, 60, 7], jnp.int32), jnp.asarray([tokens, tokens - 1, 0], jnp.int32)
        self.check_attend(executor, "bfloat16", (4, 2, 16, 20 + SPARE_SLOTS, 20), start, count, tokens)
        self.check_attend(executor, "float32", (4, 4, 10, 110, None), start, count, tokens)
        self.check_attend(executor, "int8", (4, 2, 80, 20 + SPARE_SLOTS, 20), start, count, tokens)

    @pytest.mark.parametrize("tokens", [1, 3])
    def test_attend_sees_keys_and_values_as_the_cache_stores_them(self, executor, tokens):
        """A pass also sees its own tokens rounded: XLA must not leave that out of one program."""
        draw = normal(1)
        q, k, v = (jnp.asarray(draw(1, tokens, 2, 16)) for _ in range(3))
        start, count = jnp.asarray([0], jnp.int32), jnp.asarray([tokens], jnp.int32)
        cache = LayerCache(*(store(np.zeros((1, 64, 2, 16)), "bfloat16") for _ in range(2)))
        out, _ = _attend(q, k, v, start, count, cache, executor=executor, window=None)
        k, v = (np.asarray(store(np.asarray(side), "bfloat16"), np.float32) for side in (k, v))
        expected, *_ = oracle.attend(q, k, v, start, count, cache, None)
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)

    def check_attend(self, executor, dtype, shape, start, count, tokens):
        heads, kv_heads, head_dim, slots, window = shape
        draw, batch = normal(0), len(start)
        q = jnp.asarray(draw(batch, tokens, heads, head_dim))
        k, v = (draw(batch, tokens, kv_heads, head_dim) for _ in range(2))
        if dtype == "int8":
            k[..., 1::32] += 100  # as by the biases of some models
        else:
            k, v = (side.astype(dtype).astype(np.float32) for side in (k, v))
        k, v = jnp.asarray(k), jnp.asarray(v)
        cache = make_cache(*(draw(batch, slots, kv_heads, head_dim) for _ in range(2)), dtype)
        out, new_cache = _attend(q, k, v, start, count, cache, executor=executor, window=window)
        expected, *sides = oracle.attend(q, k, v, start, count, cache, window)
        allowed = TOLERANCE
        if dtype == "int8":  # scores are in the hundreds; on the CPU of queries rounded to 16 bits
            allowed = 1e-3 if getattr(executor, "host", executor).name == "cpu" else 1e-4
        for row, exists in enumerate(np.asarray(count)):
            np.testing.assert_allclose(out[row, :exists], expected[row, :exists], rtol=0, atol=allowed)
        assert new_cache.keys.dtype == new_cache.values.dtype == dtype
        found = (new_cache.keys, new_cache.key_scale), (new_cache.values, new_cache.value_scale)
        for side, wanted in zip(found, sides):
            np.testing.assert_array_equal(oracle.restored(*side), wanted)

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_a_damaged_key_does_not_hide(self, executor, dtype):
        """NaN at the newest position, alone in its block of 64 slots, comes out as NaN."""
        cache = make_cache(*(np.zeros((1, 128, 2, 64), np.float32) for _ in range(2)), dtype)
        ones, damaged = (store(np.full((1, 1, 2, 64), value), "float32") for value in (1, np.nan))
        start, count = jnp.array([64], jnp.int32), jnp.array([1], jnp.int32)
        out, _ = _attend(ones, damaged, ones, start, count, cache, executor=executor, window=None)
        assert np.isnan(np.asarray(out)).all()

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_damaged_keys_of_many_tokens_do_not_hide(self, executor, dtype):
        """NaN in one channel of one head; of so many tokens XLA's maximum loses it."""
        cache = make_cache(*(np.zeros((1, 64, 2, 64), np.float32) for _ in range(2)), dtype)
        ones = np.ones((1, 48, 2, 64), np.float32)
        damaged = ones.copy()
        damaged[:, :, 0, 0] = np.nan
        stored_ones, stored = (store(x, "float32") for x in (ones, damaged))
        start, count = jnp.array([0], jnp.int32), jnp.array([48], jnp.int32)
        out, _ = _attend(stored_ones, stored, stored_ones, start, count, cache, executor=executor, window=None)
        is_nan = np.isnan(np.asarray(out))
        assert is_nan[:, :, 0].all()
        assert not is_nan[:, :, 1].any()

    def test_norm(self, executor):
        x, scale = jnp.asarray(normal(0)(2, 3, 37)), jnp.asarray(np.linspace(-1, 2, 37), jnp.float32)
        found = executor.norm(x, scale, 1e-2)
        exact = np.asarray(x, np.float64)
        expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-2) * np.asarray(scale, np.float64)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("pipeline", ["sequential", "parallel"])
    def test_route_scales_groups_of_neurons_and_leaves_out_those_of_factor_zero(self, executor, pipeline):
        """Of three tokens one is idle; the gate rows of the group that no token takes hold NaN."""
        spec = dataclasses.replace(KINDS["reglu"], pipeline=pipeline)
        x, ffn, predictor = problem(bits=4)
        route = jnp.asarray([[1.0, 0, 0.5], [0, 0, 0], [0, 0, 2]])
        left_out = (np.arange(300) // 100 == 1)[:, None]
        broken = dataclasses.replace(ffn, gate=jnp.asarray(np.where(left_out, np.nan, ffn.gate)))
        y, counts = sparse_ffn(executor, x, broken, predictor, spec, route)
        expected, expected_counts = oracle.ffn(x, ffn, predictor, spec, route)
        np.testing.assert_array_equal(counts, expected_counts)
        np.testing.assert_array_equal(counts[1], [0, 0])
        np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())

    def test_sparse_ffn_reads_no_row_that_is_not_predicted(self, executor):
        """Rows of neurons that are not predicted hold NaN: one that is read, or a masked dense product, would show."""
        x, ffn, predictor = problem(batch=1)
        scores = np.asarray(x, np.float64) @ oracle.matrix(predictor.a).T @ oracle.matrix(predictor.b).T
        keep = (scores[0] + np.asarray(predictor.bias) > 0)[:, None]
        for _, spec in SPARSE_FFNS:
            up = None if spec.up is None else ffn.up
            matrices = (
                None if m is None else jnp.asarray(np.where(keep, m, np.nan)) for m in (ffn.gate, up, ffn.down_t)
            )
            y, _ = sparse_ffn(executor, x, FFNWeights(*matrices, ffn.threshold), predictor, spec)
            expected, _ = oracle.ffn(x, dataclasses.replace(ffn, up=up), predictor, spec)
            np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
