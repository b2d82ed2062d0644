"""How JAX arrays cross to torch: host memory is shared through DLPack, and each weight is copied to the device once.

A tensor on the device lives as long as the JAX array that it was made from. What shares JAX's memory is never written.
"""

import threading
import weakref
from typing import Any

import jax
import numpy as np

from cann_bridge.devices import import_torch, predictor_dtype, weight_dtype

Matrix = jax.Array | tuple[jax.Array, jax.Array]
"""Floats, or low-bit rows (values, scale): values int8, or uint8 with two 4-bit numbers a byte."""

_ROWS = 1024
"""Unpacked at once, so that no float32 copy of a large matrix is held."""
_lock = threading.RLock()
_resident: dict[tuple, Any] = {}
_held: dict[int, Any] = {}
_next_handle = [1]


def borrow(array: jax.Array):
    """The array as a torch tensor on the host that shares its memory; not to be written."""
    return import_torch().from_dlpack(array)


def values_of(matrix: Matrix) -> jax.Array:
    return matrix[0] if isinstance(matrix, tuple) else matrix


def resident(matrix: Matrix, where, dtype=None):
    """The matrix on the device, in the dtype it is multiplied in there; made at the first call for an array, and kept.

    Raises:
      ValueError: it holds values that the dtype cannot.
    """
    array = values_of(matrix)
    dtype = dtype or weight_dtype(str(array.dtype), where)
    return _once(array, ("matrix", str(where), dtype), lambda: _moved(matrix, where, dtype))


def resident_predictor(a: Matrix, b: Matrix, bias: jax.Array, width: int, where) -> tuple:
    """A predictor's a (R, width), b and bias on the device.

    Where they are held in 16 bits, each row of a is divided by a power of two, and the column of b multiplied by it:
    the entries of a are the inverse of what the features' spread may be, which float16 cannot always hold.
    """
    dtype = predictor_dtype(where)

    def make():
        torch = import_torch()
        first = _moved(a, where, torch.float32, width)
        second = _moved(b, where, torch.float32, first.shape[0])
        if dtype != torch.float32:
            largest = torch.maximum(first, -first).amax(dim=1).clamp(min=1e-30)
            scale = torch.exp2(torch.floor(torch.log2(largest)))
            first, second = (first / scale[:, None]).to(dtype), (second * scale[None]).to(dtype)
        for name, tensor in (("a", first), ("b", second)):
            _check_finite(tensor, f"the predictor's {name}", dtype)
        return first, second, borrow(bias).to(where)

    return _once(values_of(b), ("predictor", str(where), dtype), make)


def hold(tensors: Any) -> jax.Array:
    """A handle () int32 by which a callback finds tensors; they are let go with it."""
    with _lock:
        number = _next_handle[0]
        _next_handle[0] += 1
        _held[number] = tensors
    handle = jax.numpy.asarray(number, np.int32)
    weakref.finalize(handle, _held.pop, number, None)
    return handle


def held(handle: Any) -> Any:
    return _held[int(handle)]


def counts() -> tuple[int, int]:
    """How many arrays have tensors on a device, and how many handles are held."""
    return len(_resident), len(_held)


def _once(array: jax.Array, key: tuple, make) -> Any:
    key = (id(array), *key)
    with _lock:
        if key not in _resident:
            _resident[key] = make()
            weakref.finalize(array, _resident.pop, key, None)
        return _resident[key]


def _moved(matrix: Matrix, where, dtype, columns: int | None = None):
    """columns: of the matrix, where it may be packed in 4 bits: an odd row has one too many in its bytes."""
    torch = import_torch()
    if not isinstance(matrix, tuple):
        tensor = borrow(matrix).to(where).to(dtype)
        _check_finite(tensor, f"a weight of shape {tuple(matrix.shape)}", dtype)
        return tensor
    values, scale = (borrow(array).to(where) for array in matrix)
    parts = []
    for start in range(0, values.shape[0], _ROWS):
        rows = values[start : start + _ROWS]
        if rows.dtype == torch.uint8:
            rows = torch.stack([(rows & 15).to(torch.float32) - 8, (rows >> 4).to(torch.float32) - 8], dim=2).flatten(1)
        if columns is not None and columns != rows.shape[1]:
            rows = rows[:, :columns].contiguous()
        parts.append((rows.to(torch.float32) * scale[start : start + _ROWS, None]).to(dtype))
    return torch.cat(parts)


def _check_finite(tensor, name: str, dtype) -> None:
    torch = import_torch()
    if tensor.dtype == torch.float16 and not float(torch.maximum(tensor, -tensor).amax()) < float("inf"):
        raise ValueError(f"{name} has values that {dtype} cannot hold; this device computes in it")
