"""PowerInfer predictor files: `model_{i}.pt` per layer, `fc1.weight` (R, D), `fc2.weight` (F, R), `fc2.bias` (F,).

This is the form SVDP writes: neuron j is predicted active iff (fc2 fc1 x + bias)_j > 0, with nothing between the two
matrices, which is a `Predictor`. The files trained for PowerInfer bear the same names without `fc2.bias` and apply a
ReLU between; that is another function, and they are refused.
"""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from convert.errors import ConversionError
from convert.files import new_directory
from convert.tensors import StoredTensor, import_torch, read_torch
from jsparse.arrays import dequantize
from jsparse.directories import read_path
from jsparse.errors import listing
from jsparse.model.config import ModelConfig
from jsparse.model.parameters import check_predictors
from jsparse.model.weights import Params, Predictor
from jsparse.settings import with_own_settings

_MATRICES = ("fc1.weight", "fc2.weight")
_NAMES = (*_MATRICES, "fc2.bias")
_LAYER_FILE = re.compile(r"model_(\d+)\.pt")
_TRAINED_FORM = (
    "there is no fc2.bias: this is the form trained for PowerInfer, with a ReLU between fc1 and fc2, which is not the "
    "predictor used here"
)


@with_own_settings
def export_predictors(params: Params, directory: str | Path) -> None:
    """Write the predictors into a new directory, in float32; imported again they are the same function.

    Raises:
      ConversionError: the model has no predictors, the directory exists, or PyTorch is not installed.
    """
    directory = read_path(directory)
    check_predictors(params)
    if params.predictors is None:
        raise ConversionError("the model has no predictors to export; fit them first (jsparse.fit_predictors)")
    torch = import_torch(f"{directory} cannot be written without")
    with new_directory(directory) as temporary:
        for layer, predictor in enumerate(params.predictors):
            arrays = (dequantize(predictor.a), dequantize(predictor.b), predictor.bias)
            state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in zip(_NAMES, arrays)}
            try:
                torch.save(state, temporary / f"model_{layer}.pt")
            except RuntimeError as error:  # what a full disk makes PyTorch raise
                raise OSError(str(error).partition("\n")[0]) from error
        import_predictors(temporary, params.config)


@with_own_settings
def import_predictors(directory: str | Path, config: ModelConfig) -> tuple[Predictor, ...]:
    """Read one predictor per layer. bfloat16 matrices stay so, other floats become float32; biases are float32.

    Raises:
      ConversionError: the model is dense, layers are missing or too many, or files are corrupt, of the form with a
        ReLU, misshaped for the model, or hold NaN; every problem of every file is listed.
    """
    directory = read_path(directory)
    if not isinstance(config, ModelConfig):
        raise ConversionError(f"config is of type {type(config).__name__}; it must be a model's configuration")
    if not config.is_sparse:
        raise ConversionError(f"a {config.ffn_kind} model zeroes no neurons, so it has no use for predictors")
    numbers = {int(match[1]) for file in directory.glob("model_*.pt") if (match := _LAYER_FILE.fullmatch(file.name))}
    problems = []
    if missing := [f"model_{layer}.pt" for layer in range(config.num_layers) if layer not in numbers]:
        problems.append(f"missing {listing(missing)}")
    if surplus := [f"model_{layer}.pt" for layer in sorted(numbers) if layer >= config.num_layers]:
        problems.append(f"the model has {config.num_layers} layers, but there is {listing(surplus)}")
    if not problems:
        files = [read_torch(directory / f"model_{layer}.pt") for layer in range(config.num_layers)]
        problems = [f"model_{i}.pt: {problem}" for i, file in enumerate(files) for problem in _problems(file, config)]
    if problems:
        raise ConversionError(f"{directory}: {listing(problems)}")
    return tuple(Predictor(*(_array(file[name]) for name in _MATRICES), _bias(file)) for file in files)


def _problems(file: dict[str, StoredTensor], config: ModelConfig) -> list[str]:
    if file.keys() == set(_MATRICES):
        return [_TRAINED_FORM]
    problems = [f"{name} is missing" for name in _NAMES if name not in file]
    problems += [f"{name} is unknown" for name in file if name not in _NAMES]
    if problems:
        return problems
    rank = file["fc1.weight"].shape[0] if file["fc1.weight"].shape else 0
    shapes = ((rank, config.hidden_size), (config.intermediate_size, rank), (config.intermediate_size,))
    for name, shape in zip(_NAMES, shapes):
        tensor = file[name]
        if tensor.shape != shape:
            problems.append(f"{name} is {tensor.shape}, expected {shape}")
        elif tensor.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
            problems.append(f"{name} is {tensor.dtype}, not floating point")
        elif np.isnan(tensor.read()).any() or (name in _MATRICES and np.isinf(tensor.read()).any()):
            problems.append(f"{name} holds NaN or infinity")
    return problems


def _array(tensor: StoredTensor) -> jnp.ndarray:
    return jnp.array(tensor.read(), "bfloat16" if tensor.dtype.name == "bfloat16" else "float32")


def _bias(file: dict[str, StoredTensor]) -> jnp.ndarray:
    return jnp.array(file["fc2.bias"].read(), "float32")
