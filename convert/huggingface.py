"""Whole Hugging Face directories as `Params`, and back."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert.config import read_config
from convert.config_writer import family_of, write_config
from convert.errors import ConversionError
from convert.files import new_directory
from convert.mapping import (
    TRAINED_PREDICTOR,
    head_is_embedding,
    read_weights,
    stored_arrays,
    with_prefix,
)
from convert.tensors import open_checkpoint, read_safetensors
from jsparse.arrays import DTYPES, Rows
from jsparse.directories import read_path
from jsparse.errors import listing
from jsparse.model.parameters import check_params
from jsparse.model.weights import Params
from jsparse.settings import with_own_settings
from jsparse.text.files import load_tokenizer

logger = logging.getLogger("convert")


@with_own_settings
def from_huggingface(directory: str | Path, *, ffn: str | None = None, dtype: str | None = None) -> Params:
    """Convert a Hugging Face checkpoint: config.json, weights and tokenizer. No code in the directory is run.

    Which FFN kind was taken and why is logged: at level INFO, or WARNING where another kind may be meant.

    Args:
      directory: holds config.json, safetensors or PyTorch weights (sharded or not), and perhaps tokenizer files.
      ffn: reglu, drelu, fatrelu or swiglu, where config.json does not tell the truth; None takes what it says.
      dtype: float32, bfloat16, float16, int8 or int4, as `jsparse.load` has them; None keeps what is stored. Norm
        scales and biases are float32 always.

    Raises:
      ConversionError: the checkpoint is incomplete, corrupt, or not of a kind that is implemented.
    """
    directory = read_path(directory)
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise ConversionError(f"dtype is {dtype!r} and must be one of {', '.join(DTYPES)}")
    if not directory.is_dir():
        raise ConversionError(f"{directory} is not a directory")
    _look_for_adapter(directory)
    reading = read_config(directory, ffn)
    logger.log(logging.WARNING if reading.doubtful else logging.INFO, "%s", reading.reason)
    stored = with_prefix(open_checkpoint(directory), reading.config, reading.family)
    if any(name.endswith(TRAINED_PREDICTOR) for name in stored):
        logger.info(
            "The checkpoint's own predictors are left out, and with them the mask by which its code multiplies the "
            "FFN; fit jsparse's with python -m jsparse.calibrate."
        )
    config = reading.config
    if config.tie_embeddings and not head_is_embedding(stored, config):
        logger.warning(
            "lm_head.weight differs from the embedding, to which config.json ties it: the stored one is used."
        )
        config = dataclasses.replace(config, tie_embeddings=False)
    tokenizer = load_tokenizer(directory)
    return Params(config, read_weights(stored, config, reading.family, dtype), None, tokenizer)


def _look_for_adapter(directory: Path) -> None:
    """Say that an adapter beside the weights is left out.

    Raises:
      ConversionError: there is an adapter alone.
    """
    if not os.path.lexists(directory / "adapter_config.json"):
        return
    advice = "merge it into its model (merge_and_unload of the package peft) and convert the result"
    if not os.path.lexists(directory / "config.json"):
        raise ConversionError(f"{directory} is an adapter, not a model: {advice}")
    logger.warning("adapter_config.json: the adapter beside the weights is left out; to have it, %s.", advice)


@with_own_settings
def to_huggingface(params: Params, directory: str | Path) -> None:
    """Write a Hugging Face directory: config.json, model.safetensors and the tokenizer's files; all of it or nothing.

    transformers loads a `reglu` or `swiglu` model without MiniCPM's scales as the same function. For the others it has
    no class, except that it takes a `drelu` model with biases for `reglu`, as it does SparseQwen2: those directories
    are for `from_huggingface` alone. Predictors are not written (`export_predictors` does that); low-bit matrices are
    written as float32.

    Raises:
      ConversionError: the directory exists, or no architecture has this combination of features.
    """
    check_params(params)
    embed = params.weights.embed
    config = write_config(params.config, "float32" if _is_quantized(embed) else embed.dtype.name)
    arrays = stored_arrays(params.weights, params.config, family_of(params.config))
    if any(isinstance(leaf, Rows) for leaf in jax.tree.leaves(params.weights, is_leaf=_is_quantized)):
        logger.warning("int8 and int4 matrices are written as float32, which Hugging Face directories have instead.")
    with new_directory(read_path(directory)) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            save_file(arrays, temporary / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        written = read_safetensors(temporary / "model.safetensors")
        if damaged := [name for name, array in arrays.items() if not np.array_equal(written[name].read(), array)]:
            raise ConversionError(f"{directory}: the tensors cannot be read back: {listing(damaged)}")
        if params.tokenizer is not None:
            params.tokenizer.save(temporary)
            load_tokenizer(temporary)


def _is_quantized(node: object) -> bool:
    return isinstance(node, Rows)
