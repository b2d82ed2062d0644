"""A simulated NPU: a torch device `npu` without hardware, whose tensors are CPU tensors and whose operations run there.

It shows what an NPU would be asked to do: every operation is logged, tensors of two devices are refused as a real one
refuses them, and so are the dtypes that the named chip cannot take. It says nothing about speed, memory or rounding.
"""

import contextlib
import dataclasses
import importlib.util
import threading

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

REFUSED = {"310P": {torch.bfloat16, "graph"}, "910B": set()}
"""What a chip does not have: dtypes, and captured graphs."""


@dataclasses.dataclass
class SimulatedNPU:
    """What was asked of the device.

    Attributes:
      log: names of the operations, and of crossings "to npu" and "to cpu" with the number of bytes.
      chip: a key of REFUSED.
    """

    log: list = dataclasses.field(default_factory=list)
    chip: str = "910B"

    def crossed(self, direction: str) -> list[int]:
        """Bytes of each crossing in that direction."""
        return [entry[1] for entry in self.log if isinstance(entry, tuple) and entry[0] == direction]

    def operations(self) -> set[str]:
        return {entry for entry in self.log if isinstance(entry, str)}


class SimulatedGraph:
    """Operations recorded as they ran, which `replay` runs again on the same tensors, as an NPU graph does."""

    def __init__(self):
        self._steps = []

    def record(self, operation, args, kwargs, outputs):
        self._steps.append((operation, args, kwargs, outputs))

    def replay(self):
        for operation, args, kwargs, outputs in self._steps:
            made = operation(*args, **kwargs)
            for old, new in zip(outputs, tree_leaves(made)):
                if old is not new:
                    old.copy_(new)
        _installed[0].log.append("replay")


_thread = threading.local()


@contextlib.contextmanager
def _capture(graph: SimulatedGraph, capture_error_mode: str):
    assert capture_error_mode == "thread_local", "other threads may generate meanwhile"
    if "graph" in REFUSED[_installed[0].chip]:
        raise RuntimeError(f"a simulated {_installed[0].chip} captures no graphs")
    _thread.capturing = graph
    try:
        yield
    finally:
        _thread.capturing = None


def _capturing() -> SimulatedGraph | None:
    return getattr(_thread, "capturing", None)


_DYNAMIC = ("aten::nonzero", "aten::_local_scalar_dense")


class _Backend:
    """What torch asks of a device's module."""

    NPUGraph = SimulatedGraph
    graph = staticmethod(_capture)

    def is_initialized(self):
        return True

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def synchronize(self, *_):
        pass

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass


class _Tensor(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        made = torch._C._acc.create_empty_tensor(list(raw.shape), raw.dtype)
        made.__class__ = _Tensor
        return made

    def __init__(self, raw):
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *_, **__):
        return f"simulated npu: {self.raw}"


_installed: list = []


def install() -> SimulatedNPU:
    """The device of this process, with an empty log."""
    if _installed:
        _installed[0].log.clear()
        _installed[0].chip = "910B"
        return _installed[0]
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("torch_npu is installed: its device would be the simulated one's")
    _setup_privateuseone_for_python_backend("npu", backend_module=_Backend())
    npu = SimulatedNPU()
    aten, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")

    def empty(size, *, dtype=None, **_):
        return _Tensor(torch.empty(size, dtype=dtype))

    def empty_strided(size, stride, *, dtype=None, **_):
        return _Tensor(torch.empty(size, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        if _capturing():
            _capturing().record(torch.Tensor.copy_, (_raw(target), _raw(source)), {}, [_raw(target)])
        if isinstance(source, _Tensor) != isinstance(target, _Tensor):
            npu.log.append(("to npu" if isinstance(target, _Tensor) else "to cpu", source.nbytes))
        _raw(target).copy_(_raw(source))
        return target

    def to_copy(tensor, *, dtype=None, device=None, **_):
        made = _raw(tensor).to(dtype or tensor.dtype, copy=True)
        to_device = isinstance(tensor, _Tensor) if device is None else torch.device(device).type == "npu"
        if to_device != isinstance(tensor, _Tensor):
            npu.log.append(("to npu" if to_device else "to cpu", made.nbytes))
        if _capturing():
            _capturing().record(torch.Tensor.copy_, (made, _raw(tensor)), {}, [made])
        return _Tensor(made) if to_device else made

    def run(operation, *args, **kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(not isinstance(tensor, _Tensor) and tensor.dim() for tensor in tensors):
            raise RuntimeError(f"{operation.name()}: expected all tensors on one device, found npu:0 and cpu")
        for tensor in tensors:
            if tensor.dtype in REFUSED[npu.chip]:
                raise RuntimeError(f"{operation.name()} does not take {tensor.dtype} on a simulated {npu.chip}")
        npu.log.append(operation.name())
        # A number that stands for a tensor arrives here as the number.
        kinds = [argument.type.kind() for argument in operation._schema.arguments]
        args = [
            torch.tensor(arg) if kind == "TensorType" and isinstance(arg, int | float) else arg
            for kind, arg in zip(kinds, args)
        ]
        if _capturing() and operation.name() in _DYNAMIC:
            raise RuntimeError(f"{operation.name()} waits for its result, which a captured graph cannot")
        raw_args, raw_kwargs = tree_map(_raw, args), tree_map(_raw, kwargs)
        out = operation(*raw_args, **raw_kwargs)
        written = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, _Tensor)}
        result = written.get(id(out)) if id(out) in written else tree_map(_wrapped, out)
        if _capturing():
            _capturing().record(operation, raw_args, raw_kwargs, [_raw(leaf) for leaf in tree_leaves(result)])
        return result

    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    aten.impl("_to_copy", to_copy, "PrivateUse1")
    fallback.fallback(run, "PrivateUse1")
    _installed.extend([npu, aten, fallback])
    return npu


def _raw(value):
    if isinstance(value, _Tensor):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "npu" else value


def _wrapped(value):
    if isinstance(value, torch.Tensor) and not isinstance(value, _Tensor):
        # The wrapper knows of contiguous tensors only.
        return _Tensor(value.contiguous())
    return value
