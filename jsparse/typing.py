"""Axis legend and array aliases used in every annotation of the package.

| letter | axis |
|---|---|
| B | batch (sequences; for an FFN executor, tokens) |
| T | tokens of a sequence |
| S | slots of the KV cache |
| D | embedding (hidden size; `d` in method papers) |
| F | FFN neurons (intermediate size; `D` in method papers) |
| R | predictor rank |
| L | layers |
| N | query heads |
| K | key/value heads |
| H | head dimension |
| V | vocabulary |
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8

Array = jax.Array | np.ndarray

__all__ = ["Array", "Bool", "Float", "Int", "Shaped", "UInt8"]
