"""Tokens over a cache: any number of them in a pass gives what one at a time gives, on every executor."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, predict_all, random_params, stored_as
from executor_suite import ROUNDED

import jsparse
from jsparse.decoding.forward import Model, forward
from jsparse.decoding.loop import initial_state, step_chunk
from jsparse.decoding.sampling import Sampling
from jsparse.executors.kernels import KernelExecutor
from jsparse.executors.npu import Npu
from jsparse.executors.select import unavailable
from jsparse.executors.xla import Xla
from jsparse.model.cache import make_caches
from jsparse.model.executor import Executor
from jsparse.model.weights import Predictor

CONFIG = dataclasses.replace(
    TINY, hidden_size=100, head_dim=26, intermediate_size=200, num_layers=2, context_length=1024
)
WINDOWED = dataclasses.replace(CONFIG, sliding_window=40)
LENGTHS = np.array([560, 300, 0], np.int32)
"""Of three sequences: one that goes round its ring many times, one that ends earlier, and one that is idle."""
PLAN = (1, 2, 16, 512, 16, 13)
"""Tokens of each pass; they begin at any position, and at some of them sequences end."""
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, sum(PLAN))).astype(np.int32)


CACHED_IN = {"int8": "bfloat16", "int4": "int8"}
"""What keys and values are stored in where weights have low-bit rows."""
ALWAYS = (("cpu", "float32"), ("cpu", "bfloat16"), ("cpu", "int4"), ("xla", "float32"))
"""Executors and storages that `make test` runs."""


def executors(storages: dict[str, tuple[str, ...]]) -> list:
    """Cases of an executor and how weights and caches are stored; what takes longest is left to `make test-all`."""
    native = pytest.mark.skipif(unavailable("cpu") is not None, reason="there is no native extension")
    made = {
        "cpu": KernelExecutor("cpu"),
        "xla": Xla(),
        "cuda interpreted": KernelExecutor("cuda"),
        "cann on PyTorch's CPU": Npu(Xla(), "cpu", whole=False),
    }
    return [
        pytest.param(
            made[name],
            dtype,
            id=f"{name}-{dtype}",
            marks=[native] * (name == "cpu") + [pytest.mark.nightly] * ((name, dtype) not in ALWAYS),
        )
        for name, dtypes in storages.items()
        for dtype in dtypes
    ]


def fitted(config: jsparse.ModelConfig, dtype: str) -> jsparse.Params:
    """With predictors at random, of which about half of the neurons pass."""
    params = stored_as(random_params(config), dtype)
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    size, width = config.intermediate_size, config.hidden_size
    predictors = tuple(Predictor(draw(8, width), draw(size, 8), draw(size)) for _ in range(config.num_layers))
    return dataclasses.replace(params, predictors=predictors)


def run(params: jsparse.Params, executor: Executor, sparse: bool, dtype: str, plan: tuple[int, ...]):
    """Logits (B, T, V), counts (L, B, 2) and caches after all tokens, taken as the plan says."""
    config = params.config
    model = Model(config, executor, config.ffn_spec())
    weights, predictors = executor.place(params.weights, params.predictors if sparse else None)
    step = jax.jit(partial(forward, model=model, logits="all"), donate_argnums=5)
    caches = make_caches(config, len(LENGTHS), TOKENS.shape[1], CACHED_IN.get(dtype, dtype))
    at, logits, total = 0, [], 0
    for size in plan:
        start, count = np.full_like(LENGTHS, at), np.clip(LENGTHS - at, 0, size)
        found, caches, counts = step(weights, predictors, TOKENS[:, at : at + size], start, count, caches)
        logits.append(np.asarray(found))
        total = total + np.asarray(counts)
        at += size
    return np.concatenate(logits, axis=1), total, caches


BOTH = ("float32", "bfloat16")
EVERY = {
    "cpu": (*BOTH, "int8", "int4"),
    "xla": (*BOTH, "int4"),
    "cuda interpreted": ("float32", "int4"),
    "cann on PyTorch's CPU": (*BOTH, "int4"),
}


@pytest.mark.parametrize(("executor", "dtype"), executors(EVERY))
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["all positions", "window"])
def test_passes_of_any_size_are_single_steps(config, sparse, executor, dtype):
    is_cpu = executor == KernelExecutor("cpu")
    params = fitted(config, dtype)
    is_rounded = dtype != "float32" and not is_cpu
    if is_rounded:  # a key may be stored rounded to its other side, and a score then passes that did not
        params = predict_all(params)
    alone, counts_alone, caches_alone = run(params, executor, sparse, dtype, (1,) * sum(PLAN))
    together, counts, caches = run(params, executor, sparse, dtype, PLAN)
    for row, length in enumerate(LENGTHS):
        atol = ROUNDED * np.abs(alone[row]).max() if is_rounded else 0 if is_cpu else 1e-5
        np.testing.assert_allclose(together[row, :length], alone[row, :length], rtol=0, atol=atol)
    # Where several tokens are rounded otherwise, a score or a gate next to zero may fall on its other side.
    np.testing.assert_allclose(counts, counts_alone, rtol=0, atol=0 if is_cpu else 8 if is_rounded else 2)
    assert not counts[:, 2].any()
    for side, wanted in zip(jax.tree.leaves(caches), jax.tree.leaves(caches_alone)):
        side, wanted = np.asarray(side, np.float32), np.asarray(wanted, np.float32)
        atol = ROUNDED * np.abs(wanted).max() if is_rounded else 0 if is_cpu else 1e-5
        np.testing.assert_allclose(side, wanted, rtol=0, atol=atol)
        assert not side[2].any(), "something was written for an idle sequence"


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("executor", "dtype"), executors(dict.fromkeys(EVERY, ("float32",))))
def test_an_idle_sequence_keeps_its_cache(executor, dtype, kv_dtype):
    params = fitted(WINDOWED, dtype)
    model = Model(WINDOWED, executor, WINDOWED.ffn_spec())
    weights, predictors = executor.place(params.weights, params.predictors)
    caches = make_caches(WINDOWED, 2, 600, kv_dtype)
    draw = np.random.default_rng(0).standard_normal
    caches = jax.tree.map(lambda side: jnp.asarray(10 * draw(side.shape), side.dtype), caches)
    before = [np.asarray(side, np.float32) for side in jax.tree.leaves(caches)]
    for size in (1, 5):
        start, count = np.array([70, 100], np.int32), np.array([0, size], np.int32)
        _, caches, counts = forward(weights, predictors, TOKENS[:2, :size], start, count, caches, model=model)
        assert not counts[:, 0].any()
        assert counts[:, 1].all()
        for side, old in zip(jax.tree.leaves(caches), before):
            np.testing.assert_array_equal(np.asarray(side[0], np.float32), old[0])
            assert (np.asarray(side[1], np.float32) != old[1]).any()


def test_logits_of_the_last_token_or_none():
    params = fitted(CONFIG, "float32")
    model = Model(CONFIG, Xla(), CONFIG.ffn_spec())
    start, count = np.zeros(2, np.int32), np.array([7, 3], np.int32)
    operands = params.weights, None, TOKENS[:2, :7], start, count, make_caches(CONFIG, 2, 64, "float32")
    every, caches, _ = forward(*operands, model=model, logits="all")
    last, _, _ = forward(*operands, model=model)
    np.testing.assert_allclose(last, every[[0, 1], count - 1], rtol=0, atol=1e-5)
    nothing, same, _ = forward(*operands, model=model, logits="none")
    assert nothing is None
    np.testing.assert_array_equal(same[1].keys, caches[1].keys)


@pytest.mark.skipif(unavailable("cpu") is not None, reason="there is no native extension")
@pytest.mark.parametrize(("kv_dtype", "prefix"), [("bfloat16", "bf16["), ("int8", "s8[")])
def test_a_decode_step_copies_nothing_of_a_caches_shape(kv_dtype, prefix):
    params = fitted(WINDOWED, "bfloat16")
    executor = KernelExecutor("cpu")
    model = Model(WINDOWED, executor, WINDOWED.ffn_spec())
    ones = np.ones(1, np.int32)
    caches = make_caches(WINDOWED, 1, 1024, kv_dtype)
    state = initial_state(ones, ones, 0, Sampling.create(CONFIG.vocab_size))
    operands = params.weights, params.predictors, caches, state, jnp.int32(4)
    text = step_chunk.lower(*operands, model=model, draws=True).compile().as_text()
    shape = prefix + ",".join(map(str, caches[0].keys.shape)) + "]"
    assert shape in text
    copies = [line for line in text.splitlines() if " copy(" in line and shape in line.partition(" copy(")[0]]
    assert not copies
