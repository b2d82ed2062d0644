"""Shared fixtures; array annotations of the package are checked at run time in tests."""

import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # a torch_npu without CANN would break `import torch`
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with the processes that tests start
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers have the cores; threads of BLAS and PyTorch would spin on them
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
else:  # where commands keep compiled programs, of all workers
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jsparse-tests-")

# ruff: noqa: E402  the import hook comes before what it checks
import pytest
from jaxtyping import install_import_hook

# Not the pytrees in arrays and model.weights: JAX also builds those around leaves that are no arrays.
_CHECKED = (
    "executors",
    "decoding.forward",
    "decoding.loop",
    "decoding.sampling",
    "model.decoder",
    "model.ffn",
    "model.layers",
    "predictors",
)
pytest.register_assert_rewrite("executor_suite")
install_import_hook([f"jsparse.{module}" for module in _CHECKED], "beartype.beartype")

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from executor_suite import is_one_of_each

import jsparse
from jsparse.arrays import Matrix
from jsparse.executors.xla import Xla
from jsparse.model.cache import make_caches
from jsparse.model.decoder import Decoder
from jsparse.model.layers import apply
from jsparse.model.parameters import Parameter, by_path, make_weights, parameters, weight_storage
from jsparse.model.weights import Predictor
from jsparse.rounding import cast

_FIRST = ("test_native", "test_readme")
"""These modules have few tests, which take long: run last, they would leave a worker idle."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Put classes and modules in the order in which workers take them, those of many tests before those of few.

    Mark as nightly the cases that a suite which compiles slowly leaves to `make test-all`.
    """
    scopes = {item: item.nodeid.rpartition("::")[0] for item in items}
    count = Counter(scopes.values())
    items.sort(key=lambda item: (item.module.__name__ not in _FIRST, -count[scopes[item]]))
    for item in items:
        is_slow = getattr(item.cls, "compiles_slowly", False) and hasattr(item, "callspec")
        if is_slow and not is_one_of_each(item.originalname, item.callspec.params):
            item.add_marker(pytest.mark.nightly)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """A run whose every test was skipped has shown nothing: `pytest -m gpu` without a GPU is no success."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist
        return
    counts = {outcome: len(reporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")}
    if exitstatus == pytest.ExitCode.OK and counts["skipped"] and not counts["passed"]:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter):
    """Say why that is."""
    if terminalreporter.stats.get("skipped") and not terminalreporter.stats.get("passed"):
        reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats["skipped"]}
        terminalreporter.write_line(f"no test ran: {'; '.join(sorted(reasons))}", red=True)


TINY = jsparse.ModelConfig(
    hidden_size=64,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=128,
    context_length=256,
    name="tiny",
)


def random_params(config: jsparse.ModelConfig, seed: int = 2) -> jsparse.Params:
    """A random model whose logits are spread enough for greedy decoding to wander."""
    rng = np.random.default_rng(seed)

    def leaf(path: str, entry: Parameter) -> jax.Array:
        if entry.role in ("norm", "bias"):
            return jnp.full(entry.shape, float(entry.role == "norm"))
        inputs = entry.shape[0 if path.endswith("down_t") else 1]
        deviation = {"embed": 1.0, "head": 0.02, "matrix": inputs**-0.5}[entry.role]
        return jnp.asarray(rng.standard_normal(entry.shape, np.float32) * np.float32(deviation))

    return jsparse.Params(config, make_weights(config, leaf))


def stored_as(params: jsparse.Params, dtype: str) -> jsparse.Params:
    """The model with its arrays stored as a model of that dtype stores them."""
    table, leaves = parameters(params.config), by_path(params.weights)

    def leaf(path: str, _) -> Matrix:
        storage = weight_storage(table[path].role, dtype)
        return leaves[path] if storage is None else cast(leaves[path], str(storage))

    return dataclasses.replace(params, weights=make_weights(params.config, leaf))


def run_decoder(params: jsparse.Params, ids: np.ndarray, feed_forward=None, count=None):
    """Logits (B, T, V) of whole sequences, and what `feed_forward` returns beside y, over caches of float32."""
    config, batch, length = params.config, *ids.shape

    def dense(layer, x, ffn):
        return Xla().dense_ffn(x, ffn, config.ffn_spec()), None

    caches = make_caches(config, batch, length, "float32")
    start, count = jnp.zeros(batch, jnp.int32), jnp.full(batch, length if count is None else count, jnp.int32)
    tokens = jnp.asarray(ids, jnp.int32)
    decoder = Decoder(config, Xla())
    logits, _, extras = apply(decoder, params.weights, tokens, start, count, feed_forward or dense, caches)
    return logits, extras


_MOST_MAPPINGS = 30_000
_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Let compiled programs go before their memory mappings reach the 65,530 that Linux allows a process by default.

    XLA would crash there, and the interpreted kernels of all these tests alone take more. To count them takes 25 ms.
    """
    yield
    mappings = Path("/proc/self/maps")
    if next(_tests_run) % 16 == 0 and mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny() -> jsparse.Params:
    return random_params(TINY)


@pytest.fixture(scope="session")
def tiny_tokens() -> list[np.ndarray]:
    return [np.random.default_rng(1).integers(0, TINY.vocab_size, 3000)]


@pytest.fixture(scope="session")
def tiny_fitted(tiny, tiny_tokens) -> jsparse.Params:
    return jsparse.fit_predictors(tiny, tiny_tokens, rank=16, sparsity=0.8)


@pytest.fixture(scope="session")
def default() -> jsparse.Params:
    return jsparse.load("default")


def predict_all(params: jsparse.Params) -> jsparse.Params:
    """The same model with predictors that predict every neuron."""
    predictors = tuple(
        dataclasses.replace(predictor, bias=jnp.full_like(predictor.bias, jnp.inf)) for predictor in params.predictors
    )
    return dataclasses.replace(params, predictors=predictors)


def with_random_predictors(params: jsparse.Params, rank: int = 16) -> jsparse.Params:
    """Give the model predictors that skip some 40% of the neurons, right or wrong."""
    c = params.config
    predictors = []
    for layer in range(c.num_layers):
        a, b, bias = jax.random.split(jax.random.key(layer), 3)
        predictors.append(
            Predictor(
                jax.random.normal(a, (rank, c.hidden_size)) / 8,
                jax.random.normal(b, (c.intermediate_size, rank)) / 4,
                0.3 + 0.1 * jax.random.normal(bias, (c.intermediate_size,)),
            )
        )
    return dataclasses.replace(params, predictors=tuple(predictors))
