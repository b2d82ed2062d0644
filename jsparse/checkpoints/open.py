"""Any path to a model: our own directories, and what `convert` reads."""

from pathlib import Path

from jsparse.arrays import DTYPES
from jsparse.checkpoints.native import is_native, load_native
from jsparse.directories import read_path
from jsparse.errors import JsparseError
from jsparse.model.weights import Params
from jsparse.settings import with_own_settings

DEFAULT_MODEL = Path(__file__).parent.parent / "default_model"


@with_own_settings
def load(directory: str | Path, *, dtype: str | None = None, ffn: str | None = None) -> Params:
    """Load a model.

    Args:
      directory: "default" for the model in the package, a directory written by `save`, or a Hugging Face checkpoint,
        which is converted in memory.
      dtype: of the matrices: float32, bfloat16, float16, int8 (rows with one scale each, the embedding left as it is)
        or int4 (groups of 32 numbers with a scale each, embedding and head in int8); as stored if None. Norm scales
        and biases are always float32.
      ffn: the FFN kind of a Hugging Face checkpoint that does not say it, one of `jsparse.model.ffn.HF_KINDS`.

    Raises:
      JsparseError: the path is missing, is not a checkpoint, or its content does not fit; the message says what.
    """
    path = DEFAULT_MODEL if isinstance(directory, str) and directory == "default" else read_path(directory)
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        raise JsparseError(f"dtype is {dtype!r} and must be one of {', '.join(DTYPES)}")
    try:
        path.stat()
        is_own = is_native(path)
    except OSError as error:
        raise JsparseError(f"{path}: {error.strerror.lower()}") from error
    if is_own:
        if ffn is not None:
            raise JsparseError(f"{path}: ffn is chosen on conversion; this is already a jsparse directory")
        return load_native(path, dtype)
    from convert import from_huggingface

    return from_huggingface(path, dtype=dtype, ffn=ffn)
