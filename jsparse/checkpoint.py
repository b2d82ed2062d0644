"""Save and load: one directory with config, weights, predictors and tokenizer.

jsparse.json   format version, config, storage of every array, and a checksum over these
weights/       Orbax checkpoint of the flattened weights
predictors/    Orbax checkpoint of the flattened predictors, where fitted
tokenizer/     tokenizer files, where there is one
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.config import ModelConfig
from jsparse.decoder import check_weights
from jsparse.errors import JsparseError
from jsparse.params import FFNWeights, Params, Predictor, check_predictors
from jsparse.quantization import QuantizedRows, cast
from jsparse.tokenizer import load_tokenizer

_MANIFEST = "jsparse.json"
_FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16", "int8")
DEFAULT_MODEL = Path(__file__).parent / "default_model"


def save(params: Params, directory: str | Path, *, force: bool = False) -> None:
    """Write the model into a new directory: under a temporary name beside it, then renamed.

    Args:
      params: the model, with or without predictors and tokenizer.
      directory: must not exist, unless `force` replaces it.
      force: replace an existing directory.

    Raises:
      JsparseError: the directory exists, or it cannot be written (a full disk, no permission).
    """
    check_weights(params.weights, params.config)
    check_predictors(params)
    with replacing_directory(directory, force=force) as partial:
        trees = {"weights": _flatten(params.weights)}
        if params.predictors is not None:
            trees["predictors"] = _flatten(dict(enumerate(params.predictors)))
        manifest = {"format": _FORMAT, "config": params.config.to_dict(), "tokenizer": params.tokenizer is not None}
        for name, tree in trees.items():
            _save_arrays(partial / name, {key: array for key, (array, _) in tree.items()})
            manifest[name] = {key: storage for key, (_, storage) in tree.items()}
        if params.tokenizer is not None:
            (partial / "tokenizer").mkdir()
            params.tokenizer.save(partial / "tokenizer")
        manifest["checksum"] = _checksum(manifest)
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def load(directory: str | Path, *, dtype: str | None = None, ffn: str | None = None) -> Params:
    """Load a model.

    Args:
      directory: "default" for the model in the package, a directory written by `save`, or a Hugging Face checkpoint,
        which is converted in memory.
      dtype: of the matrices: float32, bfloat16, float16 or int8 (rows with one scale each, the embedding left as it
        is); as stored if None. Norm scales and biases are always float32.
      ffn: the FFN kind of a Hugging Face checkpoint that does not say it (reglu, drelu, fatrelu, swiglu).

    Raises:
      JsparseError: the path is missing, is not a checkpoint, or its content does not fit; the message says what.
    """
    path = DEFAULT_MODEL if str(directory) == "default" else Path(directory)
    try:
        path.stat()
    except OSError as error:
        raise JsparseError(f"{path}: {error.strerror.lower()}") from error
    if (path / _MANIFEST).is_file():
        if ffn is not None:
            raise JsparseError(f"{path}: ffn is chosen on conversion; this is already a jsparse directory")
        if dtype is not None and dtype not in DTYPES:
            raise JsparseError(f"dtype is {dtype!r} and must be one of {', '.join(DTYPES)}")
        return _load_directory(path, dtype)
    from convert import from_huggingface

    return from_huggingface(path, dtype=dtype, ffn=ffn)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The checked content of jsparse.json.

    Raises:
      JsparseError: the file cannot be read, was changed, or is of another format version.
    """
    path = Path(directory) / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, checksum = manifest["format"], manifest.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JsparseError(f"{path}: cannot be read as the description of a model: {error!r}") from error
    if version != _FORMAT:
        raise JsparseError(f"{path}: has format {version}; this version of jsparse reads {_FORMAT}")
    if checksum != _checksum(manifest):
        raise JsparseError(f"{path}: was changed after it was written (its checksum differs); save the model again")
    return manifest


@contextlib.contextmanager
def replacing_directory(directory: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its name when the block ends, or is removed if it fails.

    Raises:
      JsparseError: the directory exists and `force` is not given, or an OSError in the block.
    """
    directory = Path(os.path.abspath(directory))
    check_new(directory, force=force)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise JsparseError(f"{directory}: cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, directory)
    except OSError as error:
        raise JsparseError(f"{directory}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, directory: Path) -> None:
    """Give `new` the name of `directory`; what was there is removed afterwards, or put back if that fails."""
    if not directory.exists():
        new.rename(directory)
        return
    old = new.with_name(f"{new.name}.old")
    directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
    shutil.rmtree(old)


def check_new(directory: str | Path, *, force: bool = False) -> None:
    """Raises: JsparseError: the directory exists and may not be replaced."""
    directory = Path(directory)
    if directory.exists() and not force:
        raise JsparseError(f"{directory} exists; choose another name, or replace it with --force (force=True)")
    if directory.exists() and not (directory / _MANIFEST).is_file() and not _is_empty(directory):
        raise JsparseError(f"{directory} exists and holds something else than a jsparse model; it is left alone")


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _load_directory(path: Path, dtype: str | None) -> Params:
    manifest = read_manifest(path)
    try:
        config = ModelConfig.from_dict(manifest["config"])
    except (ValueError, TypeError) as error:
        raise JsparseError(f"{path / _MANIFEST}: {error}") from error
    predictors = None
    if "predictors" in manifest:
        tree = _unflatten(_load_arrays(path / "predictors", manifest["predictors"]), manifest["predictors"])
        predictors = tuple(Predictor(**tree[layer]) for layer in sorted(tree, key=int))
    weights = _unflatten(_load_arrays(path / "weights", manifest["weights"]), manifest["weights"])
    for name, layer in weights.items():
        if name.startswith("layers_"):
            layer["ffn"] = FFNWeights(**layer["ffn"])
    check_weights(weights, config)
    if dtype is not None:
        _cast(weights, dtype)
    tokenizer = load_tokenizer(path / "tokenizer")
    if manifest["tokenizer"] and tokenizer is None:
        raise JsparseError(f"{path / 'tokenizer'}: the tokenizer's files are missing")
    params = Params(config, weights, predictors, tokenizer)
    check_predictors(params)
    return params


def _cast(node: dict[str, Any], dtype: str) -> None:
    """Store every matrix below in another dtype, one at a time in place, as the converter would have."""
    for name in list(node):
        child = node[name]
        if isinstance(child, dict):
            _cast(child, dtype)
        elif isinstance(child, FFNWeights):
            parts = {part: getattr(child, part) for part in ("gate", "up", "down_t")}
            node[name] = child = None
            _cast(parts, dtype)
            node[name] = FFNWeights(**parts)
        elif len(child.shape) == 2 and not (dtype == "int8" and name == "embed"):
            node[name] = cast(child, dtype)
            if not isinstance(node[name], QuantizedRows) and not jnp.isfinite(node[name]).all():
                raise JsparseError(f"a weight {name} does not fit in {dtype}; choose bfloat16 or float32")


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flatten(tree: Any) -> dict[str, tuple[jax.Array, dict]]:
    """Slash-separated path -> (array, how it is stored); a quantised matrix is two arrays."""
    flat = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, QuantizedRows))
    for path, leaf in leaves:
        key = "/".join(str(getattr(entry, "key", getattr(entry, "name", None))) for entry in path)
        if isinstance(leaf, QuantizedRows):
            storage = {"bits": leaf.bits, "columns": leaf.columns}
            flat[f"{key}/values"] = (leaf.values, {**_describe(leaf.values), **storage})
            flat[f"{key}/scale"] = (leaf.scale, _describe(leaf.scale))
        else:
            flat[key] = (leaf, _describe(leaf))
    return flat


def _describe(array: jax.Array) -> dict:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": digest(array)}


def digest(array: jax.Array) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _unflatten(arrays: dict[str, jax.Array], storage: dict[str, dict]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, array in arrays.items():
        *parents, last = key.split("/")
        if last == "scale" and f"{'/'.join(parents)}/values" in arrays:
            continue
        if last == "values":
            prefix, kept = "/".join(parents), storage[key]
            array = QuantizedRows(array, arrays[f"{prefix}/scale"], kept["bits"], kept["columns"])
            *parents, last = parents
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def _save_arrays(directory: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory, arrays)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(_first_line(error)) from error


def _load_arrays(directory: Path, storage: dict[str, dict]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not the device it was saved from
    wanted = {
        key: jax.ShapeDtypeStruct(kept["shape"], jnp.dtype(kept["dtype"]), sharding=here)
        for key, kept in storage.items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(directory.absolute(), wanted)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise JsparseError(f"{directory}: the arrays cannot be read: {_first_line(error)}") from error
    damaged = [key for key, kept in storage.items() if digest(arrays[key]) != kept["crc32"]]
    if damaged:
        raise JsparseError(f"{directory}: the arrays cannot be read: {', '.join(damaged[:5])} damaged")
    return arrays


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
