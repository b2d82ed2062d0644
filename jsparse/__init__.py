"""Training-free contextual sparsity for ReGLU language models, in JAX."""

from jsparse.api import fit_predictors
from jsparse.checkpoints.native import save
from jsparse.checkpoints.open import load
from jsparse.decoding.generate import generate
from jsparse.errors import JsparseError
from jsparse.model.config import PRESETS, ModelConfig
from jsparse.model.weights import FFNWeights, Params, Predictor, Weights
from jsparse.predictors.options import CalibrationOptions, LayerReport

__version__ = "0.2.0"
__all__ = [
    "PRESETS",
    "CalibrationOptions",
    "FFNWeights",
    "JsparseError",
    "LayerReport",
    "ModelConfig",
    "Params",
    "Predictor",
    "Weights",
    "fit_predictors",
    "generate",
    "load",
    "save",
]
