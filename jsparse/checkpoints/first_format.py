"""What version 0.1 called the weights, in directories of format 1 and in calibrations that it left unfinished."""

import re
from typing import Any

import jax

from jsparse.model.parameters import by_path
from jsparse.model.weights import Weights

_NAMES = {"norm": "norm/scale", "head": "lm_head"}
_NAMES |= {name: f"{name}/scale" for name in ("input_norm", "post_attention_norm")}
_NAMES |= {f"attention/{part}/rows": f"attention/{part}_proj" for part in "qkvo"}
_NAMES |= {f"attention/{part}/bias": f"attention/{part}_bias" for part in "qkv"}
_PATHS = {name: path for path, name in _NAMES.items()}
_FFN = ("gate", "up", "down_t")


def path_of(name: str) -> str:
    """The path in the table of parameters of what 0.1 called `name`."""
    layer, inside = re.fullmatch(r"(?:layers_(\d+)/)?(.*)", name).groups()
    path = _PATHS.get(inside, inside)
    return path if layer is None else f"layers/{layer}/{path}"


def leaves_in_order(weights: Weights) -> list[Any]:
    """Every array in the order in which 0.1 went through them, which the identity of a calibration rests on."""

    def key(path: str) -> tuple[str, ...]:
        layer, inside = re.fullmatch(r"(?:layers/(\d+)/)?(.*)", path).groups()
        parts = _NAMES.get(inside, inside).split("/")
        if parts[0] == "ffn":
            parts[1] = str(_FFN.index(parts[1]))
        return tuple(parts) if layer is None else (f"layers_{layer}", *parts)

    leaves = by_path(weights)
    return jax.tree.leaves([leaves[path] for path in sorted(leaves, key=key)])
