"""The native extension as JAX functions: bad arguments, threads, memory, and what happens without it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cpu_kernels
import jsparse
from jsparse.executors import select
from jsparse.executors.xla import Xla
from jsparse.model.ffn import KINDS

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(
    cpu_kernels.unavailable() is not None, reason=f"cpu_kernels: {cpu_kernels.unavailable()}"
)


def matrices(width=16, neurons=24):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((neurons, width)), jnp.bfloat16) for _ in range(3)]


def attend(heads=2, start=0, count=3, window=None, dtype=jnp.float32, scales=()):
    """Three tokens of one sequence over a cache of four slots."""
    q, new, side = jnp.ones((1, 3, heads, 8)), jnp.ones((1, 3, 2, 8)), jnp.ones((1, 4, 2, 8), dtype)
    numbers = (jnp.full(1, number, jnp.int32) for number in (start, count))
    return cpu_kernels.attend(q, new, new, *numbers, side, side, scales, window=window)


@needs_native
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, g, u, d: cpu_kernels.linear(x, g[:, :8]),
            r"linear: weight 0 has shape \(24, 8\), expected \(any, 16\)",
        ),
        (lambda x, g, u, d: cpu_kernels.linear(x[0], g), r"linear: x has shape \(16\), expected \(any, any\)"),
        (
            lambda x, g, u, d: cpu_kernels.linear(x, g.astype(jnp.int32)),
            "weight 0 is int32, expected float32, bfloat16",
        ),
        (
            lambda x, g, u, d: cpu_kernels.linear(x, (g.astype(jnp.int8), jnp.ones((23, 1)))),
            r"weight 0's scale has shape \(23, 1\), expected \(24, 1\)",
        ),
        (
            lambda x, g, u, d: cpu_kernels.dense_ffn(x, g, u[:7], d, jnp.zeros(24)),
            r"dense_ffn: up has shape \(7, 16\), expected \(24, 16\)",
        ),
        (
            lambda x, g, u, d: cpu_kernels.sparse_ffn(x, g, u, d, jnp.zeros(24), g[:4], u[:, :5], jnp.zeros(9)),
            r"sparse_ffn: b has shape \(24, 5\), expected \(24, 4\); bias has shape \(9\), expected \(24\)",
        ),
        (
            lambda x, g, u, d: cpu_kernels.sparse_ffn(
                x, g, u, d, jnp.zeros(24), g[:4], u[:, :4], jnp.zeros(24), activation="silu"
            ),
            "sparse_ffn: activation is silu, which has no zeros to skip",
        ),
        (
            lambda x, g, u, d: cpu_kernels.dense_ffn(x, g, None, d, jnp.zeros(23)),
            r"dense_ffn: threshold has shape \(23\), expected \(24\)",
        ),
        (lambda *_: attend(heads=5), "attend: the 5 heads of q are no multiple of the 2 of k"),
        (lambda *_: attend(start=-1), "attend: start 0 is negative"),
        (lambda *_: attend(count=4), "attend: count 0 is 4 of 3 tokens"),
        (lambda *_: attend(count=-1), "attend: count 0 is -1 of 3 tokens"),
        (lambda *_: attend(window=0), "attend: window is 0, expected at least 1"),
        (lambda *_: attend(dtype=jnp.int32), "attend: keys are neither float32, bfloat16, float16 nor int8"),
        (lambda *_: attend(dtype=jnp.int8), "attend: the keys' scale is float32, expected bfloat16"),
        (
            lambda *_: attend(dtype=jnp.int8, scales=(jnp.ones((1, 4, 2, 2), jnp.bfloat16),) * 2),
            r"attend: the keys' scale has shape \(1, 4, 2, 2\), expected \(1, 4, 2, 1\)",
        ),
        (
            lambda x, g, u, d: cpu_kernels.sparse_ffn(
                x, g, u, d, jnp.zeros(24), g[:4], u[:, :4], jnp.zeros(24), route=jnp.ones((2, 5))
            ),
            "sparse_ffn: route has 5 groups, which do not divide 24 neurons",
        ),
        (
            lambda x, g, u, d: jax.ffi.ffi_call("jsparse_cpu_linear", jax.ShapeDtypeStruct((1, 1), jnp.float32))(),
            "linear: x is missing",
        ),
        (
            lambda x, g, u, d: jax.ffi.ffi_call("jsparse_cpu_linear", [jax.ShapeDtypeStruct((2, 24), jnp.float32)] * 2)(
                x, g, jnp.zeros(0)
            ),
            "linear: there are more operands or results than it has",
        ),
        (lambda x, g, u, d: cpu_kernels.read(jnp.zeros(8, jnp.int4)), "read: data is of another type"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    x = jnp.ones((2, 16))
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(x, *matrices()))


@needs_native
def test_the_native_names_are_those_of_python():
    assert cpu_kernels.native_names() == (cpu_kernels.ACTIVATIONS, cpu_kernels.UP_ACTIVATIONS)
    for kind, spec in KINDS.items():
        assert spec.activation in cpu_kernels.ACTIVATIONS, kind
        assert (spec.up or "none") in cpu_kernels.UP_ACTIVATIONS, kind


_HASHED = """
import hashlib, jax, jax.numpy as jnp, numpy as np
import cpu_kernels, jsparse
from jsparse.predictors.texts import default_texts
from executor_suite import problem
from jsparse.executors.kernels import KernelExecutor
from jsparse.model.ffn import KINDS
from jsparse.model.weights import Linear
cpu = KernelExecutor("cpu")
parts = [cpu_kernels.num_threads() * 0]
for storage in ("float32", "bfloat16", "int8", "int4:32"):
    x, ffn, predictor = problem(storage=storage, bits=4, width=200, neurons=900, rank=60)
    parts += [*cpu.sparse_ffn(x, ffn, predictor, KINDS["reglu"]), cpu.dense_ffn(x, ffn, KINDS["reglu"])]
    parts += cpu.project(x, [Linear(ffn.gate)])
    parts.append(cpu.dense_ffn(jnp.tile(x, (20, 1)), ffn, KINDS["reglu"]))
print(int(cpu_kernels.num_threads()), hashlib.sha256(b"".join(np.asarray(p).tobytes() for p in parts)).hexdigest())
"""


@needs_native
def test_results_do_not_depend_on_the_number_of_threads():
    found = {}
    for threads in (1, 2, 4):
        environment = {
            **os.environ,
            "NPROC": str(threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        done = subprocess.run(
            [sys.executable, "-c", _HASHED], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
        )
        count, digest = done.stdout.split()
        found[int(count)] = digest
    assert found.keys() == {1, 2, 4}
    assert len(set(found.values())) == 1


@needs_native
def test_the_cache_is_updated_in_place_in_a_loop():
    """A decode step that copied its cache would need another one of temporary memory."""

    def loop(q, keys, values):
        def step(i, carry):
            out, keys, values = carry
            return cpu_kernels.attend(out, out, out, jnp.full((1,), i), jnp.ones(1, jnp.int32), keys, values)

        return jax.lax.fori_loop(0, 8, step, (q, keys, values))

    cache = jnp.zeros((1, 4096, 2, 64), jnp.bfloat16)
    compiled = jax.jit(loop, donate_argnums=(1, 2)).lower(jnp.ones((1, 1, 2, 64)), cache, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.nbytes / 10


@needs_native
def test_weights_are_not_copied():
    x, (gate, up, down) = jnp.ones((1, 512)), matrices(512, 4096)
    compiled = (
        jax.jit(lambda x, *m: cpu_kernels.dense_ffn(x, *m, jnp.zeros(m[0].shape[0]))).lower(x, gate, up, down).compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < gate.nbytes / 10


@needs_native
def test_read_depends_on_every_byte():
    data = np.random.default_rng(0).integers(0, 255, (1 << 20) + 77, np.uint8)
    before = int(cpu_kernels.read(jnp.asarray(data)))
    for place in (0, 5, 1 << 19, len(data) - 1):
        changed = data.copy()
        changed[place] ^= 64
        assert int(cpu_kernels.read(jnp.asarray(changed))) != before


def test_without_the_extension_xla_is_used_and_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(cpu_kernels, "_native", None)
    monkeypatch.setattr(cpu_kernels, "_MISSING", "it was not built", raising=False)
    select.first_available.cache_clear()
    try:
        assert select.select_executor() == Xla()
        (record,) = caplog.records
        assert record.message.startswith("executor: xla; cuda cannot run here: ")
        assert record.message.endswith("; cpu cannot run here: the native extension is missing: it was not built")
        with pytest.raises(
            jsparse.JsparseError, match="executor 'cpu' cannot run here: the native extension is missing"
        ):
            select.select_executor("cpu")
    finally:
        select.first_available.cache_clear()


@needs_native
def test_executors_generate_the_same_tokens(default):
    params = jsparse.fit_predictors(default, [np.arange(4000) % default.config.vocab_size], rank=16)
    prompt = "def read(self, size):\n"
    for sparse in (False, True):
        texts = {
            name: jsparse.generate(params, prompt, max_new_tokens=48, sparse=sparse, executor=name)
            for name in ("xla", "cpu")
        }
        assert texts["xla"] == texts["cpu"]
