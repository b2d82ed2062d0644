"""Whole Hugging Face directories as `Params`, and back."""

import json
import logging
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert.config import read_config
from convert.config_writer import write_config
from convert.errors import ConversionError
from convert.files import new_directory
from convert.mapping import read_weights, stored_array, stored_dtype, weight_table
from convert.tensors import open_checkpoint
from jsparse.checkpoint import DTYPES
from jsparse.config import FFNKind
from jsparse.params import Params
from jsparse.tokenizer import load_tokenizer

logger = logging.getLogger("convert")


def from_huggingface(directory: str | Path, *, ffn: FFNKind | None = None, dtype: str | None = None) -> Params:
    """Convert a Hugging Face checkpoint: config.json, weights and tokenizer. No code in the directory is run.

    Which FFN kind was taken and why is logged: at level INFO, or WARNING where another kind may be meant.

    Args:
      directory: holds config.json, safetensors or PyTorch weights (sharded or not), and perhaps tokenizer files.
      ffn: reglu, drelu, fatrelu or swiglu, where config.json does not tell the truth; None takes what it says.
      dtype: float32, bfloat16, float16 or int8 (linear matrices quantised by row); None keeps what is stored. Norm
        scales and biases are float32 always.

    Raises:
      ConversionError: the checkpoint is incomplete, corrupt, or not of a kind that is implemented.
    """
    directory = Path(directory)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype is {dtype!r} and must be one of {', '.join(DTYPES)}")
    if not directory.is_dir():
        raise ConversionError(f"{directory} is not a directory")
    reading = read_config(directory, ffn)
    logger.log(logging.WARNING if reading.doubtful else logging.INFO, "%s", reading.reason)
    stored = open_checkpoint(directory)
    tokenizer = load_tokenizer(directory)
    return Params(reading.config, read_weights(stored, reading.config, dtype), None, tokenizer)


def to_huggingface(params: Params, directory: str | Path) -> None:
    """Write a Hugging Face directory: config.json, model.safetensors and the tokenizer's files; all of it or nothing.

    transformers loads a `reglu` or `swiglu` model without MiniCPM's scales as the same function. For the others it has
    no class, except that it takes a `drelu` model with biases for `reglu`, as it does SparseQwen2: those directories
    are for `from_huggingface` alone. Predictors are not written (`export_predictors` does that); int8 matrices are
    written as float32.

    Raises:
      ConversionError: the directory exists, or no architecture has this combination of features.
    """
    table = weight_table(params.config)
    dtype = stored_dtype(params.weights, table["model.embed_tokens.weight"]).name
    config = write_config(params.config, dtype)
    arrays = {name: np.ascontiguousarray(stored_array(params.weights, slot)) for name, slot in table.items()}
    with new_directory(Path(directory)) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(arrays, temporary / "model.safetensors", {"format": "pt"})
        if params.tokenizer is not None:
            params.tokenizer.save(temporary)
