"""How JAX arrays cross to torch: host memory is shared through DLPack, and each weight is copied to the device once.

A tensor on the device lives as long as the JAX array that it was made from. What shares JAX's memory is never written.
"""

import itertools
import threading
import weakref
from typing import Any

import jax
import numpy as np

from cann_bridge.devices import import_torch, predictor_dtype, weight_dtype

Matrix = jax.Array | tuple[jax.Array, jax.Array]
"""Floats; low-bit rows (values, scale), of int8, or uint8 with two 4-bit numbers a byte; or (values, codebook), where
the float16 scales of every 32 columns follow a row's codes of 4 bits, and codebook (16,) int8 says what a code is."""

_ROWS = 1024
"""Unpacked at once, so that no float32 copy of a large matrix is held."""
_lock = threading.RLock()
_resident: dict[tuple, Any] = {}
_held: dict[int, Any] = {}
_owners: dict[int, int] = {}
_numbers = itertools.count(1)


def borrow(array: jax.Array):
    """The array as a torch tensor on the host that shares its memory; not to be written."""
    return import_torch().from_dlpack(array)


def resident(matrix: Matrix, device, dtype=None, columns: int | None = None):
    """The matrix on the device, in the dtype it is multiplied in there; made at the first call for an array, and kept.

    Args:
      columns: of a matrix that may be packed in 4 bits: an odd row has one too many in its bytes.

    Raises:
      ValueError: it holds values that the dtype cannot.
    """
    dtype = dtype or weight_dtype(str(arrays_of(matrix)[0].dtype), device)
    return _once(arrays_of(matrix), ("matrix", str(device), dtype), lambda: _moved(matrix, device, dtype, columns))


def resident_predictor(a: Matrix, b: Matrix, bias: jax.Array, width: int, device) -> tuple:
    """A predictor's a (R, width), b and bias on the device.

    Where they are held in 16 bits, each row of a is divided by a power of two, and the column of b multiplied by it:
    the entries of a are the inverse of what the features' spread may be, which float16 cannot always hold.
    """
    dtype = predictor_dtype(device)

    def make():
        torch = import_torch()
        first = _moved(a, device, torch.float32, width)
        second = _moved(b, device, torch.float32, first.shape[0])
        if dtype != torch.float32:
            largest = torch.maximum(first, -first).amax(dim=1).clamp(min=1e-30)
            scale = torch.exp2(torch.floor(torch.log2(largest)))
            first, second = (first / scale[:, None]).to(dtype), (second * scale[None]).to(dtype)
        for name, tensor in (("a", first), ("b", second)):
            _check_finite(tensor, f"the predictor's {name}", dtype)
        return first, second, borrow(bias).to(device)

    return _once((*arrays_of(a), *arrays_of(b), bias), ("predictor", str(device), dtype), make)


def hold(arrays: tuple[jax.Array, ...], device, tensors: Any) -> jax.Array:
    """A handle () int32 by which a callback finds tensors, for as long as it or an array they were made from lives.

    The handle alone would not do: a program that was dispatched with it may not have run when it goes.
    """

    def make():
        number = next(_numbers)
        _held[number] = tensors
        _owners[number] = 0
        _own(arrays[0], number)
        return number

    with _lock:
        number = _once(arrays, ("handle", str(device)), make)
        handle = jax.numpy.asarray(number, np.int32)
        _own(handle, number)
    return handle


def _own(owner: Any, number: int) -> None:
    _owners[number] += 1
    weakref.finalize(owner, _disown, number)


def _disown(number: int) -> None:
    with _lock:
        _owners[number] -= 1
        if not _owners[number]:
            del _owners[number], _held[number]


def held(handle: Any) -> Any:
    return _held[int(handle)]


def counts() -> tuple[int, int]:
    """How much is kept for arrays, and how many handles are held."""
    return len(_resident), len(_held)


def _once(arrays: tuple[jax.Array, ...], key: tuple, make) -> Any:
    """What `make` returns for these very arrays, kept until one of them goes."""
    key = (*map(id, arrays), *key)
    with _lock:
        if key not in _resident:
            _resident[key] = make()
            for array in arrays:
                weakref.finalize(array, _resident.pop, key, None)
        return _resident[key]


def arrays_of(matrix: Matrix) -> tuple[jax.Array, ...]:
    """Values, and the scales or the codebook where there are some."""
    return matrix if isinstance(matrix, tuple) else (matrix,)


def _moved(matrix: Matrix, device, dtype, columns: int | None = None):
    torch = import_torch()
    if not isinstance(matrix, tuple):
        tensor = borrow(matrix).to(dtype)  # on the host: not every device has the stored dtype
        _check_finite(tensor, f"a weight of shape {tuple(matrix.shape)}", dtype)
        return tensor.to(device)
    values, scale = map(borrow, matrix)
    if scale.dtype == torch.int8:
        codebook, groups = scale.to(torch.float32).to(device), -(-values.shape[1] // 18)
        # Bytes become float16 on the host: not every device gives memory another type.
        scale = values[:, -2 * groups :].contiguous().view(torch.float16).to(torch.float32)
        values = values[:, : -2 * groups]
    elif tuple(scale.shape) == (values.shape[0], 1):
        codebook = None
    else:
        raise ValueError(f"scales of shape {tuple(scale.shape)}; a row has one on this device")
    values, scale = values.contiguous().to(device), scale.to(device)
    parts = []
    for start in range(0, values.shape[0], _ROWS):
        rows, factor = values[start : start + _ROWS], scale[start : start + _ROWS]
        if rows.dtype == torch.uint8:
            rows = torch.stack([rows & 15, rows >> 4], dim=2).flatten(1)
            rows = rows.to(torch.float32) - 8 if codebook is None else codebook[rows.to(torch.int64)]
        if codebook is not None:
            factor = _cut(factor[:, :, None].expand(-1, -1, 32).flatten(1), rows.shape[1])
        parts.append(_cut(rows.to(torch.float32) * factor, columns or rows.shape[1]).to(dtype))
        _check_finite(parts[-1], f"a weight of {values.shape[0]} rows", dtype)
    return torch.cat(parts)


def _cut(rows, columns: int):
    return rows if rows.shape[1] == columns else rows[:, :columns].contiguous()


def _check_finite(tensor, name: str, dtype) -> None:
    torch = import_torch()
    if tensor.dtype == torch.float16 and not float(torch.maximum(tensor, -tensor).amax()) < float("inf"):
        raise ValueError(f"{name} has values that {dtype} cannot hold; this device computes in it")
