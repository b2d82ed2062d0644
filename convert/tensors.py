"""Checkpoint files as tensors: what is stored without reading it, then one tensor at a time."""

import dataclasses
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import safetensors

from convert.errors import ConversionError
from convert.files import check_file, read_json
from jsparse.errors import listing

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


Index = slice | tuple[slice, ...]
_ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
      file: where it is.
      shape: its shape.
      dtype: its dtype; bfloat16 is `ml_dtypes.bfloat16`.
      read: `read()` reads all of it, `read(index)` the part at a slice, or at one slice per axis.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[..., np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def open_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face directory by name: safetensors before PyTorch files, one file before shards.

    Raises:
      ConversionError: there are no weights, a file is missing, truncated or corrupt, a shard's tensor is missing or
        appears in two shards, or PyTorch files are met without PyTorch.
    """
    for single, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        if os.path.lexists(directory / single):
            return read(directory / single)
        if os.path.lexists(directory / f"{single}.index.json"):
            return _read_shards(directory / f"{single}.index.json", read)
    raise ConversionError(
        f"{directory} has no weights: looked for model.safetensors, model.safetensors.index.json, pytorch_model.bin "
        "and pytorch_model.bin.index.json"
    )


def _read_shards(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ConversionError(f"{index} has no weight_map from tensor names to file names")
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ConversionError(f"{index} names files outside its own directory: {listing(outside)}")
    if absent := [shard for shard in shards if not os.path.isfile(index.parent / shard)]:
        raise ConversionError(f"{index} names shards that do not exist: {listing(absent)}")

    tensors: dict[str, StoredTensor] = {}
    duplicates = []
    for shard in shards:
        for name, tensor in read(index.parent / shard).items():
            if name in tensors:
                duplicates.append(f"{name} (in {tensors[name].file.name} and {shard})")
            tensors[name] = tensor
    if duplicates:
        raise ConversionError(f"{index.parent}: tensors found in two shards: {listing(duplicates)}")
    misplaced = [f"{n} ({f})" for n, f in weight_map.items() if n not in tensors or tensors[n].file.name != f]
    if misplaced:
        raise ConversionError(f"{index} names tensors that are not in their shards: {listing(misplaced)}")
    return tensors


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
      ConversionError: the file cannot be read, is truncated, or its header is malformed.
    """
    check_file(path)
    try:
        file = safetensors.safe_open(path, "np")
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise ConversionError(f"{path} is truncated, corrupt or no safetensors file: {error}") from None
    unsupported = [f"{name} ({view.get_dtype()})" for name, view in views.items() if view.get_dtype() not in _DTYPES]
    if unsupported:
        raise ConversionError(f"{path} has tensors of a dtype that is not supported: {listing(unsupported)}")
    return {
        name: StoredTensor(
            path, tuple(view.get_shape()), _DTYPES[view.get_dtype()], lambda index=_ALL, view=view: view[index]
        )
        for name, view in views.items()
    }


def read_torch(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one PyTorch file by name. Only tensors are unpickled, never other objects, and no code is run.

    Raises:
      ConversionError: PyTorch is not installed, or the file is missing, corrupt, or holds more than tensors.
    """
    check_file(path)
    torch = import_torch(f"{path} is a PyTorch file, which needs")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # torch.load has no base class for what a corrupt or unsafe file makes it raise
        # torch's own advice, to load it with weights_only=False, would run what is in the file.
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {named[1]}" if named else str(error).strip().partition("\n")[0]
        reason = "it is damaged, or holds other objects" if "weights_only" in reason else reason
        raise ConversionError(f"{path} is no PyTorch file of tensors alone, or is corrupt: {reason}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    if numbered := [repr(name) for name in content if not isinstance(name, str)]:
        raise ConversionError(f"{path} names tensors by things that are no strings: {listing(numbered)}")
    if strange := [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise ConversionError(f"{path} holds things that are not tensors: {listing(strange)}")
    kinds = {name: _strange_kind(torch, tensor) for name, tensor in content.items()}
    if strange := [f"{name} ({kind})" for name, kind in kinds.items() if kind]:
        raise ConversionError(f"{path} holds tensors that are no plain arrays of numbers: {listing(strange)}")
    return {name: _torch_entry(torch, path, tensor) for name, tensor in content.items()}


def _strange_kind(torch: ModuleType, tensor) -> str | None:
    """Why a tensor has no form as an array, or None."""
    if tensor.is_meta:
        return "without content, on the device meta"
    if tensor.is_quantized or tensor.layout != torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"{tensor.layout}, {tensor.dtype}, {type(tensor).__name__}".replace("torch.", "")
    return None if _numpy_dtype(tensor.dtype) else str(tensor.dtype).removeprefix("torch.")


def _numpy_dtype(dtype) -> np.dtype | None:
    name = str(dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, None) or name)
    except TypeError:
        return None


def _torch_entry(torch: ModuleType, path: Path, tensor) -> StoredTensor:
    def read(index: Index = _ALL) -> np.ndarray:
        part = tensor.detach()[index].resolve_conj().resolve_neg()
        if part.dtype == torch.bfloat16:
            return part.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()

    return StoredTensor(path, tuple(tensor.shape), _numpy_dtype(tensor.dtype), read)


def import_torch(reason: str) -> ModuleType:
    """PyTorch, which is needed only for PyTorch's own files; `reason` begins the error's sentence, which it ends.

    Raises:
      ConversionError: it is not installed.
    """
    autoload = "TORCH_DEVICE_BACKEND_AUTOLOAD"
    before = os.environ.get(autoload)
    os.environ[autoload] = "0"  # an installed torch_npu without CANN would make the import fail
    try:
        import torch
    except ImportError:
        raise ConversionError(f"{reason} PyTorch: pip install torch") from None
    finally:
        os.environ.pop(autoload) if before is None else os.environ.update({autoload: before})
    return torch
