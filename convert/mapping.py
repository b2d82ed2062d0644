"""The table from Hugging Face tensor names to weights, and the weights read and written through it."""

import functools
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from convert.errors import ConversionError
from convert.families import Family
from convert.tensors import Index, StoredTensor
from jsparse.arrays import Rows, Storage, aligned_empty, dequantize
from jsparse.errors import listing
from jsparse.model.config import ModelConfig
from jsparse.model.parameters import Role, by_path, make_weights, parameters, weight_storage
from jsparse.model.weights import Weights
from jsparse.rounding import quantize_by_blocks

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_BLOCK_ELEMENTS = 2**20
_LONG = 2**31
"""Bytes of weights from which reading them shows its progress."""

TRAINED_PREDICTOR = ("mlp.predictor.fc1.weight", "mlp.predictor.fc2.weight")
_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", *TRAINED_PREDICTOR)

_LAYER = re.compile(r"layers/(\d+)/(.*)")


class Slot(NamedTuple):
    """Where a tensor belongs.

    Attributes:
      path: of the parameter in the table of `jsparse.model.parameters`.
      shape: as stored in the checkpoint.
      role: of the parameter.
      transposed: whether the checkpoint stores the matrix the other way round.
    """

    path: str
    shape: tuple[int, ...]
    role: Role
    transposed: bool


@functools.lru_cache(maxsize=4)
def weight_table(config: ModelConfig, family: Family) -> dict[str, Slot]:
    """The slot of every tensor of a model by its Hugging Face name."""
    table = {}
    for path, entry in parameters(config).items():
        layer = _LAYER.fullmatch(path)
        name = f"model.layers.{layer[1]}.{family.names[layer[2]]}" if layer else family.names[path]
        transposed = path.endswith("ffn/down_t")
        table[name] = Slot(path, entry.shape[::-1] if transposed else entry.shape, entry.role, transposed)
    return table


def read_weights(stored: dict[str, StoredTensor], config: ModelConfig, family: Family, dtype: str | None) -> Weights:
    """`Params.weights` from a checkpoint's tensors, one at a time: of those not yet converted, one is in memory.

    Args:
      stored: the checkpoint's tensors by name.
      config: the architecture.
      family: what gives the tensors their names.
      dtype: one of `DTYPES`, or None for each matrix as it is stored; `weight_storage` says what it means. Norm
        scales and biases are always float32.

    Raises:
      ConversionError: tensors are missing, unknown, of the wrong shape or not floating point (all listed at once), or
        one holds NaN or infinity.
    """
    table = weight_table(config, family)
    _check(stored, table, config)
    total = sum(stored[name].nbytes for name in table)
    console = Console(stderr=True)
    quiet = total < _LONG or not console.is_terminal
    leaves = {}
    for name in track(table, "Converting", console=console, disable=quiet, transient=True):
        leaves[table[name].path] = _convert(name, stored[name], table[name], dtype)
    return make_weights(config, lambda path, _: leaves[path])


def with_prefix(stored: dict[str, StoredTensor], config: ModelConfig, family: Family) -> dict[str, StoredTensor]:
    """The tensors under the names of a causal model: the base model's own files leave out the prefix "model.".

    Raises:
      ConversionError: a tensor is there under both names.
    """
    table = weight_table(config, family)
    spelled = {name: f"model.{name}" if name not in table and f"model.{name}" in table else name for name in stored}
    if doubled := [name for name, full in spelled.items() if full != name and full in stored]:
        raise ConversionError(f"tensors found with and without the prefix 'model.': {listing(doubled)}")
    return {spelled[name]: tensor for name, tensor in stored.items()}


def head_is_embedding(stored: Mapping[str, StoredTensor], config: ModelConfig) -> bool:
    """Whether a checkpoint's lm_head.weight, where there is one, holds what its embedding holds."""
    embed, head = (stored.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if embed is None or head is None:
        return True
    for tensor in (embed, head):
        if tensor.shape != (config.vocab_size, config.hidden_size) or tensor.dtype.name not in _FLOATS:
            return False  # which is told of where the tensors of the table are checked
    return all(np.array_equal(embed.read(rows), head.read(rows)) for rows in _blocks(embed.shape))


def _check(stored: dict[str, StoredTensor], table: dict[str, Slot], config: ModelConfig) -> None:
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    unknown = [name for name in stored if name not in table and name not in tied and not name.endswith(_IGNORED)]
    shared = [name for name in table if name in stored]
    wrong = [
        f"{name} is {stored[name].shape}, expected {table[name].shape}"
        for name in shared
        if stored[name].shape != table[name].shape
    ]
    strange = [f"{name} is {stored[name].dtype}" for name in shared if stored[name].dtype.name not in _FLOATS]
    problems = {
        "missing": [name for name in table if name not in stored],
        "unknown": unknown,
        "wrongly shaped": wrong,
        "not floating point": strange,
    }
    if any(problems.values()):
        folder = next((f"{tensor.file.parent}: " for tensor in stored.values()), "")
        found = "; ".join(f"{len(items)} {kind}: {listing(items)}" for kind, items in problems.items() if items)
        raise ConversionError(f"{folder}the tensors do not fit the configuration: {found}")


def _convert(name: str, tensor: StoredTensor, slot: Slot, dtype: str | None) -> jax.Array | Rows:
    transposed = slot.transposed
    stored = "float32" if tensor.dtype == np.float64 else tensor.dtype.name
    storage = weight_storage(slot.role, dtype)
    if storage is not None and storage.is_low_bit:
        return _quantize(name, tensor, transposed, storage)
    target = "float32" if slot.role in ("norm", "bias") else stored if storage is None else storage.dtype
    out = aligned_empty(slot.shape[::-1] if transposed else slot.shape, jnp.dtype(target))
    with np.errstate(over="ignore"):
        for rows in _blocks(tensor.shape):
            source = _finite(name, tensor, rows)
            block = source.astype(out.dtype)
            if not np.isfinite(block).all():
                raise ConversionError(f"{tensor.file}: {name} does not fit in {target}; choose bfloat16 or float32")
            (out.T if transposed else out)[rows] = block
    return jax.device_put(out)


def _finite(name: str, tensor: StoredTensor, index: Index) -> np.ndarray:
    part = tensor.read(index)
    if not np.isfinite(part).all():
        raise ConversionError(f"{tensor.file}: {name} holds NaN or infinity")
    return part


def _quantize(name: str, tensor: StoredTensor, transposed: bool, storage: Storage) -> Rows:
    shape = tensor.shape[::-1] if transposed else tensor.shape

    def part(rows: slice) -> np.ndarray:
        stored = _finite(name, tensor, (slice(None), rows)).T if transposed else _finite(name, tensor, rows)
        return stored.astype(np.float32)

    try:
        return quantize_by_blocks(shape, _blocks(shape), part, storage)
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"{tensor.file}: {name} does not fit in {storage}: {error}") from error


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    """Slices of rows small enough that what is computed from one is small beside a large array."""
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def stored_arrays(weights: Weights, config: ModelConfig, family: Family) -> dict[str, np.ndarray]:
    """Every weight under its Hugging Face name, as the checkpoint stores it; quantised rows become float32."""
    leaves, arrays = by_path(weights), {}
    for name, slot in weight_table(config, family).items():
        leaf = leaves[slot.path]
        array = np.asarray(dequantize(leaf) if isinstance(leaf, Rows) else leaf)
        arrays[name] = np.ascontiguousarray(array.T if slot.transposed else array)
    return arrays
