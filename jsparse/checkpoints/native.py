"""Our own directories: one with config, weights, predictors and tokenizer.

jsparse.json   format version, config, storage of every array, and a checksum over these
weights/       Orbax checkpoint of the flattened weights
predictors/    Orbax checkpoint of the flattened predictors, where fitted
tokenizer/     tokenizer files, where there is one
"""

import hashlib
import json
import math
import operator
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import GROUP, Matrix, Rows, check_rows, restore_rows
from jsparse.checkpoints.first_format import path_of
from jsparse.directories import plain_path, read_path, replacing_directory
from jsparse.errors import JsparseError, listing
from jsparse.model.config import ModelConfig
from jsparse.model.parameters import (
    by_path,
    check_leaves,
    check_params,
    check_predictors,
    make_weights,
    parameters,
    weight_storage,
)
from jsparse.model.weights import Params, Predictor
from jsparse.options import check_flag
from jsparse.rounding import cast
from jsparse.settings import with_own_settings
from jsparse.text.files import load_tokenizer

_MANIFEST = "jsparse.json"
_FORMAT = 2
_READ = (1, 2)
_PORTION = 2**27
_TREES = ("weights", "predictors")


@with_own_settings
def save(params: Params, directory: str | Path, *, force: bool = False) -> None:
    """Write the model into a new directory: under a temporary name beside it, then renamed.

    Args:
      params: the model, with or without predictors and tokenizer.
      directory: must not exist, unless `force` replaces it.
      force: replace an existing directory.

    Raises:
      JsparseError: the directory exists, or it cannot be written (a full disk, no permission).
    """
    directory = read_path(directory)
    check_flag("force", force)
    check_params(params)
    _check_loadable(params)
    check_new(directory, force=force)
    with replacing_directory(directory) as partial:
        trees = {"weights": _flatten(by_path(params.weights))}
        if params.predictors is not None:
            trees["predictors"] = _flatten(by_path(params.predictors))
        manifest = {"format": _FORMAT, "config": params.config.to_dict(), "tokenizer": params.tokenizer is not None}
        for name, tree in trees.items():
            _save_arrays(partial / name, {key: array for key, (array, _) in tree.items()})
            manifest[name] = {key: storage for key, (_, storage) in tree.items()}
        if params.tokenizer is not None:
            (partial / "tokenizer").mkdir()
            params.tokenizer.save(partial / "tokenizer")
        manifest["checksum"] = _checksum(manifest)
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        _read_back(partial)


def _check_loadable(params: Params) -> None:
    """Raises: JsparseError: `load` would refuse a low-bit matrix, or a predictor."""
    predictors = by_path(params.predictors)
    for name, leaf in {**by_path(params.weights), **predictors}.items():
        try:
            if isinstance(leaf, Rows):
                check_rows(leaf)
            elif name in predictors:
                _check_no_nan(leaf)
        except ValueError as error:
            raise JsparseError(f"{name} cannot be saved: {error}") from error


def _check_no_nan(array: jax.Array, name: str = "it") -> None:
    """Raises: ValueError: the array holds NaN."""
    if jnp.isnan(array).any():
        raise ValueError(f"{name} holds NaN")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The checked content of jsparse.json.

    Raises:
      JsparseError: the file cannot be read, was changed, or is of another format version.
    """
    path = Path(directory) / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, checksum = manifest["format"], manifest.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise JsparseError(f"{path}: cannot be read as the description of a model: {reason}") from error
    if version not in _READ:
        known = " and ".join(map(str, _READ))
        raise JsparseError(f"{path}: has format {version}; this version of jsparse reads {known}")
    if checksum != _checksum(manifest):
        raise JsparseError(f"{path}: was changed after it was written (its checksum differs); save the model again")
    if problem := _problem(manifest):
        raise JsparseError(f"{path}: does not describe a model: {problem}")
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    """What a manifest lacks, or None."""
    if missing := {"config", "tokenizer", "weights"} - manifest.keys():
        return f"{listing(sorted(missing))} is missing"
    for tree in _TREES:
        if not isinstance(manifest.get(tree, {}), dict):
            return f"{tree} are no table"
        for key, kept in manifest.get(tree, {}).items():
            needed = {"shape", "dtype", "crc32"} | ({"bits", "columns"} if key.endswith("/values") else set())
            if not isinstance(kept, dict) or needed - kept.keys():
                return f"{key} lacks {', '.join(sorted(needed))}"
            try:
                math.prod(map(operator.index, kept["shape"])) * jnp.dtype(kept["dtype"]).itemsize
            except TypeError:
                return f"{key} is stored as {kept['dtype']!r} {kept['shape']!r}"
            if any(type(kept[name]) is not int for name in ("bits", "columns") if name in needed):
                return f"{key} has {kept['columns']!r} columns of {kept['bits']!r} bits"
            if key.endswith("/values") and len(kept["shape"]) != 2:
                return f"{key} has the shape {kept['shape']!r}, which is no matrix"
            if kept.get("group") not in (None, GROUP):
                return f"{key} is in groups of {kept['group']!r} columns; there are groups of {GROUP} only"
    return None


def check_new(directory: str | Path, *, force: bool = False) -> None:
    """Raises: JsparseError: the directory exists and may not be replaced."""
    directory = Path(directory)
    try:
        directory.exists()
    except OSError as error:
        raise JsparseError(f"{directory}: {error.strerror or error}") from error
    if directory.exists() and not force:
        raise JsparseError(f"{directory} exists; choose another name, or replace it with --force (force=True)")
    if directory.exists() and not is_native(directory) and not _is_empty(directory):
        raise JsparseError(f"{directory} exists and holds something else than a jsparse model; it is left alone")


def is_native(directory: Path) -> bool:
    """Whether a directory was written by `save`."""
    return (directory / _MANIFEST).is_file()


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def load_native(path: Path, dtype: str | None) -> Params:
    """The model in a directory that `save` wrote, its matrices in another dtype if one is given.

    Raises:
      JsparseError: a file is missing, damaged or of another format, or a weight does not fit in the dtype.
    """
    manifest = read_manifest(path)
    try:
        config = ModelConfig.from_dict(manifest["config"])
    except (ValueError, TypeError) as error:
        raise JsparseError(f"{path / _MANIFEST}: {error}") from error
    predictors = None
    if "predictors" in manifest:
        predictors = _predictors(_load_tree(path / "predictors", manifest["predictors"]), path)
    weights = _load_tree(path / "weights", manifest["weights"])
    if manifest["format"] == 1:
        weights = {path_of(name): leaf for name, leaf in weights.items()}
    check_leaves(weights, config)
    if dtype is not None:
        _cast(weights, config, dtype)
    weights = make_weights(config, lambda name, _: weights[name])
    tokenizer = load_tokenizer(path / "tokenizer")
    if manifest["tokenizer"] and tokenizer is None:
        raise JsparseError(f"{path / 'tokenizer'}: the tokenizer's files are missing")
    params = Params(config, weights, predictors, tokenizer)
    check_predictors(params)
    return params


def _predictors(leaves: dict[str, Matrix], path: Path) -> tuple[Predictor, ...]:
    """The predictors whose parts are named "layer/part"."""
    layers: dict[int, dict[str, Matrix]] = {}
    try:
        for name, leaf in leaves.items():
            layer, part = name.split("/")
            layers.setdefault(int(layer), {})[part] = leaf
            if not isinstance(leaf, Rows):
                _check_no_nan(leaf, name)
        return tuple(Predictor(**layers[layer]) for layer in sorted(layers))
    except (ValueError, TypeError) as error:
        raise JsparseError(f"{path / _MANIFEST}: does not describe predictors: {error}") from error


def _cast(weights: dict[str, Matrix], config: ModelConfig, dtype: str) -> None:
    """Store every matrix in another dtype, one at a time in place, as the converter would have."""
    for name, entry in parameters(config).items():
        storage = weight_storage(entry.role, dtype)
        if storage is None:
            continue
        try:
            weights[name] = cast(weights[name], str(storage))
        except ValueError as error:
            raise JsparseError(f"the weight {name} does not fit in {dtype}: {error}") from error
        if not isinstance(weights[name], Rows) and not jnp.isfinite(weights[name]).all():
            raise JsparseError(f"the weight {name} does not fit in {dtype}; choose bfloat16 or float32")


def _checksum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flatten(leaves: dict[str, Matrix]) -> dict[str, tuple[jax.Array, dict]]:
    """Name -> (array, how it is stored); a quantised matrix is two arrays, its values and their scales or codebook."""
    flat = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Rows):
            storage = {"bits": leaf.storage.bits, "columns": int(leaf.columns), "group": leaf.storage.group}
            flat[f"{name}/values"] = (leaf.values, {**_describe(leaf.values), **storage})
            parts = {"scale": leaf.scale, "codebook": leaf.codebook}
            flat |= {f"{name}/{part}": (array, _describe(array)) for part, array in parts.items() if array is not None}
        else:
            flat[name] = (leaf, _describe(leaf))
    return flat


def _describe(array: jax.Array) -> dict:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": digest(array)}


def digest(array: jax.Array) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _load_tree(directory: Path, storage: dict[str, dict]) -> dict[str, Matrix]:
    """What `_flatten` made flat.

    Raises:
      JsparseError: an array cannot be read, or is not what a low-bit matrix has.
    """
    arrays: dict[str, jax.Array] = {}
    for some in _portions(storage):  # Orbax needs memory beside what it reads at once
        arrays |= _load_arrays(directory, some)
    leaves: dict[str, Matrix] = {}
    for name, array in arrays.items():
        whole, _, part = name.rpartition("/")
        if part == "values":
            kept, scale, codebook = storage[name], arrays.get(f"{whole}/scale"), arrays.get(f"{whole}/codebook")
            try:
                leaves[whole] = restore_rows(array, scale, kept["bits"], kept["columns"], codebook)
            except ValueError as error:
                raise JsparseError(f"{directory}: {whole}: {error}") from error
        elif part not in ("scale", "codebook") or f"{whole}/values" not in arrays:
            leaves[name] = array
    return leaves


def _save_arrays(directory: Path, arrays: dict[str, jax.Array]) -> None:
    import orbax.checkpoint as ocp

    try:
        # Orbax takes a path for a pattern, and TensorStore a backslash for a separator.
        with plain_path(directory.parent) as parent, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(parent / directory.name, arrays)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise OSError(_first_line(error)) from error


def _load_arrays(directory: Path, storage: dict[str, dict]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not the device it was saved from
    wanted = {
        key: jax.ShapeDtypeStruct(kept["shape"], jnp.dtype(kept["dtype"]), sharding=here)
        for key, kept in storage.items()
    }
    how = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    try:
        with plain_path(directory.parent) as parent, ocp.PyTreeCheckpointer() as checkpointer:
            arrays = checkpointer.restore(parent / directory.name, args=how)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise JsparseError(f"{directory}: the arrays cannot be read: {_first_line(error)}") from error
    damaged = [
        key
        for key, kept in storage.items()
        if not isinstance(arrays[key], jax.Array) or digest(arrays[key]) != kept["crc32"]
    ]
    if damaged:
        raise JsparseError(f"{directory}: the arrays cannot be read: {', '.join(damaged[:5])} damaged")
    return arrays


def _read_back(directory: Path) -> None:
    """Read a written model again, some arrays at a time, so that success is said only of what can be loaded.

    Raises:
      JsparseError: something is missing or damaged.
    """
    manifest = read_manifest(directory)
    for name in _TREES:
        for some in _portions(manifest.get(name, {})):
            _load_arrays(directory / name, some)
    if manifest["tokenizer"]:
        load_tokenizer(directory / "tokenizer")


def _portions(storage: dict[str, dict]) -> Iterator[dict[str, dict]]:
    """The arrays in portions of some `_PORTION` bytes."""
    some, size = {}, 0
    for key, kept in storage.items():
        some[key] = kept
        size += math.prod(kept["shape"]) * jnp.dtype(kept["dtype"]).itemsize
        if size >= _PORTION:
            yield some
            some, size = {}, 0
    if some:
        yield some


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
