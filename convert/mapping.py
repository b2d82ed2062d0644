"""The table from Hugging Face tensor names to weights, and the weights read and written through it."""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from convert.errors import ConversionError, listing
from convert.tensors import Index, StoredTensor
from jsparse.arrays import QuantizedRows, aligned_empty, dequantize, quantize_rows_jit
from jsparse.model.config import ModelConfig
from jsparse.model.decoder import weight_shapes
from jsparse.model.weights import FFNWeights

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_BLOCK_ELEMENTS = 2**20
_LONG = 2**31
"""Bytes of weights from which reading them shows its progress."""

TRAINED_PREDICTOR = ("mlp.predictor.fc1.weight", "mlp.predictor.fc2.weight")
_IGNORED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", *TRAINED_PREDICTOR)

_LAYER = {
    "input_layernorm.weight": ("input_norm", "scale"),
    "self_attn.q_proj.weight": ("attention", "q_proj"),
    "self_attn.q_proj.bias": ("attention", "q_bias"),
    "self_attn.k_proj.weight": ("attention", "k_proj"),
    "self_attn.k_proj.bias": ("attention", "k_bias"),
    "self_attn.v_proj.weight": ("attention", "v_proj"),
    "self_attn.v_proj.bias": ("attention", "v_bias"),
    "self_attn.o_proj.weight": ("attention", "o_proj"),
    "post_attention_layernorm.weight": ("post_attention_norm", "scale"),
    "mlp.gate_proj.weight": ("ffn", "gate"),
    "mlp.up_proj.weight": ("ffn", "up"),
    "mlp.down_proj.weight": ("ffn", "down_t"),
}


class Slot(NamedTuple):
    """Where a tensor belongs.

    Attributes:
      path: keys from the root of `Params.weights`.
      shape: as stored in the checkpoint.
      role: `vector` (norm scales and biases), `embed`, `linear`, or `transposed`: a linear matrix kept the other way.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    role: Literal["vector", "embed", "linear", "transposed"]


@functools.lru_cache(maxsize=4)
def weight_table(config: ModelConfig) -> dict[str, Slot]:
    """The slot of every tensor of a model by its Hugging Face name, shapes taken from the decoder itself."""
    shapes = weight_shapes(config)
    paths = {"model.embed_tokens.weight": ("embed",), "model.norm.weight": ("norm", "scale")}
    for layer in range(config.num_layers):
        for name, path in _LAYER.items():
            if config.qkv_bias or not name.endswith(".bias"):
                paths[f"model.layers.{layer}.{name}"] = (f"layers_{layer}", *path)
    if not config.tie_embeddings:
        paths["lm_head.weight"] = ("lm_head",)

    table = {}
    for name, path in paths.items():
        shape = get(shapes, path).shape
        role = "vector" if len(shape) == 1 else {"embed": "embed", "down_t": "transposed"}.get(path[-1], "linear")
        table[name] = Slot(path, shape[::-1] if role == "transposed" else shape, role)
    return table


def get(weights: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf of `Params.weights` at a slot's path."""
    node: Any = weights
    for key in path:
        node = getattr(node, key) if isinstance(node, FFNWeights) else node[key]
    return node


def read_weights(stored: dict[str, StoredTensor], config: ModelConfig, dtype: str | None) -> dict[str, Any]:
    """`Params.weights` from a checkpoint's tensors, one at a time: of those not yet converted, one is in memory.

    Args:
      stored: the checkpoint's tensors by name.
      config: the architecture.
      dtype: one of `DTYPES`, or None for each matrix as it is stored. int8 quantises linear matrices by row and leaves
        the embedding as stored. Norm scales and biases are always float32.

    Raises:
      ConversionError: tensors are missing, unknown, of the wrong shape or not floating point (all listed at once), or
        one holds NaN or infinity.
    """
    table = weight_table(config)
    _check(stored, table, config)
    total = sum(stored[name].nbytes for name in table)
    console = Console(stderr=True)
    quiet = total < _LONG or not console.is_terminal
    weights: dict[str, Any] = {}
    for name in track(table, "Converting", console=console, disable=quiet, transient=True):
        *parents, last = table[name].path
        node = weights
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = _convert(name, stored[name], table[name], dtype)
    for layer in range(config.num_layers):
        weights[f"layers_{layer}"]["ffn"] = FFNWeights(**weights[f"layers_{layer}"]["ffn"])
    return weights


def with_prefix(stored: dict[str, StoredTensor], config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors under the names of a causal model: the base model's own files leave out the prefix "model.".

    Raises:
      ConversionError: a tensor is there under both names.
    """
    table = weight_table(config)
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


def _convert(name: str, tensor: StoredTensor, slot: Slot, dtype: str | None) -> jax.Array | QuantizedRows:
    transposed = slot.role == "transposed"
    stored = "float32" if tensor.dtype == np.float64 else tensor.dtype.name
    if dtype == "int8" and slot.role in ("linear", "transposed"):
        return _quantize(name, tensor, transposed)
    target = "float32" if slot.role == "vector" else stored if dtype in (None, "int8") else dtype
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


def _quantize(name: str, tensor: StoredTensor, transposed: bool) -> QuantizedRows:
    shape = tensor.shape[::-1] if transposed else tensor.shape
    values, scale = aligned_empty(shape, np.dtype(np.int8)), np.empty(shape[0], np.float32)
    for rows in _blocks(shape):
        part = _finite(name, tensor, (slice(None), rows)).T if transposed else _finite(name, tensor, rows)
        block = quantize_rows_jit(part.astype(np.float32), 8)
        values[rows], scale[rows] = block.values, block.scale
    return QuantizedRows(jax.device_put(values), jnp.asarray(scale), 8, shape[1])


def _blocks(shape: tuple[int, ...]) -> list[slice]:
    """Slices of rows small enough that what is computed from one is small beside a large array."""
    step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def stored_array(weights: Mapping[str, Any], slot: Slot) -> np.ndarray:
    """A weight as the checkpoint stores it; quantised rows become float32."""
    leaf = get(weights, slot.path)
    array = np.asarray(dequantize(leaf) if isinstance(leaf, QuantizedRows) else leaf)
    return array.T if slot.role == "transposed" else array


def stored_dtype(weights: Mapping[str, Any], slot: Slot) -> np.dtype:
    """The dtype of `stored_array`."""
    leaf = get(weights, slot.path)
    return np.dtype(np.float32) if isinstance(leaf, QuantizedRows) else np.dtype(leaf.dtype)
