"""The suite on every executor that can run here, and on those whose device is missing interpreted or on a stand-in."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import simulated_npu
from executor_suite import ExecutorSuite

import jsparse
from jsparse.arrays import Storage, cast, dequantize, quantize_rows, storage_of, take_rows
from jsparse.executors.kernels import KernelExecutor
from jsparse.executors.select import make_executor, select_executor, unavailable
from jsparse.executors.xla import Xla


def where_it_runs(name: str):
    """The suite where that executor can run, else one test that says why it cannot."""

    def choose(suite: type) -> type:
        if (reason := unavailable(name)) is None:
            return suite
        skipped = pytest.mark.skip(reason=f"executor {name}: {reason}")(lambda self: None)
        return type(suite.__name__, (), {"test_it_runs_here": skipped, "__module__": __name__})

    return choose


class TestXla(ExecutorSuite):
    compiles_slowly = True

    def make(self):
        return Xla()


@where_it_runs("cpu")
class TestCpu(ExecutorSuite):
    def make(self):
        return select_executor("cpu")


@pytest.mark.gpu
@where_it_runs("cuda")
class TestCuda(ExecutorSuite):
    def make(self):
        return select_executor("cuda")


class TestCudaInterpreted(ExecutorSuite):
    compiles_slowly = True

    def make(self):
        if unavailable("cuda") is None:
            pytest.skip("executor cuda runs here itself")
        return KernelExecutor("cuda")


@where_it_runs("cann")
class TestCann(ExecutorSuite):
    def make(self):
        return dataclasses.replace(select_executor("cann"), whole=False)


class TestCannOnPyTorchsCpu(ExecutorSuite):
    def make(self):
        return dataclasses.replace(make_executor("cann"), device="cpu", whole=False)


class TestCannOnASimulatedNpu(ExecutorSuite):
    def make(self):
        if unavailable("cann") is None:
            pytest.skip("executor cann runs here itself")
        simulated_npu.install()
        return dataclasses.replace(make_executor("cann"), whole=False)


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.01), ("int8:8", 0.006), ("int4", 0.2), ("int4:8", 0.1)])
def test_quantised_rows_round_trip(name, bound):
    values, storage = jax.random.normal(jax.random.key(0), (50, 33)), Storage.parse(name)
    stored = quantize_rows(values, storage)
    assert stored.shape == (50, 33)
    assert stored.scale.shape == (50, 5 if storage.group else 1)
    assert storage_of(stored) == storage
    exact = oracle.matrix(stored)
    assert np.linalg.norm(exact - np.asarray(values)) / np.linalg.norm(values) < bound
    np.testing.assert_allclose(dequantize(stored), exact, rtol=1e-6)
    np.testing.assert_allclose(take_rows(stored, jnp.asarray([7, 50])), [exact[7], np.zeros(33)], rtol=1e-6)
    cast_there = cast(values, name)
    np.testing.assert_array_equal(cast_there.values, stored.values)
    np.testing.assert_allclose(cast_there.scale, stored.scale, rtol=1e-6)
    assert cast(stored, name) is stored
    assert storage_of(cast(stored, "bfloat16")) == Storage("bfloat16")
    zeros = quantize_rows(jnp.zeros((2, 8)), storage)
    np.testing.assert_array_equal(zeros.scale, 1)


@pytest.mark.parametrize("text", ["float32", "bfloat16", "float16", "int8", "int4", "int8:16", "int4:32"])
def test_storages_are_named(text):
    storage = Storage.parse(text)
    assert str(storage) == text
    assert storage.bits == {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}[storage.dtype]
    assert storage.is_low_bit == text.startswith("int")


@pytest.mark.parametrize(
    "text",
    [
        "int3",
        "float32:4",
        "int4:0",
        "int4:",
        "int4:-1",
        "int4:x",
        "int4:8:8",
        "int4:08",
        "int4:٣",
        "int4:999999",
        "",
        None,
        8,
    ],
)
def test_what_is_no_storage_is_refused(text):
    with pytest.raises(jsparse.JsparseError, match=re.escape(f"a matrix cannot be stored in {text!r}; known are")):
        Storage.parse(text)


def test_floats_are_no_quantised_rows():
    with pytest.raises(ValueError, match="storage is float32; quantised rows have 8 or 4 bits"):
        quantize_rows(jnp.zeros((2, 3)), Storage("float32"))
