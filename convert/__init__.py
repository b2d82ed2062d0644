"""Checkpoints of other formats: Hugging Face directories and PowerInfer predictor files, in and out."""

from convert.errors import ConversionError
from convert.huggingface import from_huggingface, to_huggingface
from convert.powerinfer import export_predictors, import_predictors

__all__ = [
    "ConversionError",
    "export_predictors",
    "from_huggingface",
    "import_predictors",
    "to_huggingface",
]
