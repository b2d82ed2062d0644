"""The suite on every executor that can run here, and on those whose device is missing interpreted or on a stand-in."""

import dataclasses

import pytest
import simulated_npu
from executor_suite import ExecutorSuite

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
