"""The table of a model's parameters, from which shapes, names on disk and random weights follow."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import DTYPES, GROUP, Matrix, Rows, Storage
from jsparse.errors import JsparseError, listing
from jsparse.model.config import ModelConfig
from jsparse.model.weights import AttentionWeights, FFNWeights, Layer, Linear, Params, Predictor, Weights
from jsparse.typing import Array

Role = Literal["embed", "head", "matrix", "norm", "bias"]
_FLOATS = tuple(dtype for dtype in DTYPES if not Storage(dtype).is_low_bit)
"""What an array that is not in low-bit rows may be stored in."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of `Weights`.

    Attributes:
      shape: of the array.
      axes: what each axis counts, in the letters of `jsparse.typing`; NH and KH are heads times their dimension.
      role: `embed` and `head` meet token ids, a `matrix` hidden states, a `norm` scales them, and a `bias` is added.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role


def weight_storage(role: Role, dtype: str | None) -> Storage | None:
    """How an array of that role is stored in a model of that dtype, one of `DTYPES`; None for as it is.

    int8 leaves the embedding as it is. In int4, embedding and head have 8 bits a number.
    """
    if dtype is None or role in ("norm", "bias"):
        return None
    if dtype == "int4":
        return Storage("int4", GROUP) if role == "matrix" else Storage("int8")
    return None if (dtype, role) == ("int8", "embed") else Storage(dtype)


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every array of a model that is stored, by its path in `Weights`, as "layers/0/attention/q/rows"."""
    c = config
    sizes = {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "F": c.intermediate_size,
        "NH": c.num_heads * c.head_dim,
        "KH": c.num_kv_heads * c.head_dim,
    }

    def parameter(role: Role, *axes: str) -> Parameter:
        return Parameter(tuple(sizes[axis] for axis in axes), axes, role)

    table = {"embed": parameter("embed", "V", "D")}
    for layer in range(c.num_layers):
        block = {"input_norm": parameter("norm", "D")}
        for name, axis in (("q", "NH"), ("k", "KH"), ("v", "KH")):
            block[f"attention/{name}/rows"] = parameter("matrix", axis, "D")
            if c.attention_bias != "none":
                block[f"attention/{name}/bias"] = parameter("bias", axis)
        block["attention/o/rows"] = parameter("matrix", "D", "NH")
        if c.attention_bias == "all":
            block["attention/o/bias"] = parameter("bias", "D")
        block["post_attention_norm"] = parameter("norm", "D")
        matrices = ("gate", "up", "down_t") if c.ffn_spec().up else ("gate", "down_t")
        block |= {f"ffn/{name}": parameter("matrix", "F", "D") for name in matrices}
        table |= {f"layers/{layer}/{path}": entry for path, entry in block.items()}
    table["norm"] = parameter("norm", "D")
    if not c.tie_embeddings:
        table["head"] = parameter("head", "V", "D")
    return table


def make_weights(config: ModelConfig, leaf: Callable[[str, Parameter], Any]) -> Weights:
    """The `Weights` whose array at every path of the table is `leaf(path, parameter)`."""
    table = parameters(config)
    found = {path: leaf(path, entry) for path, entry in table.items()}
    threshold = jnp.full((config.intermediate_size,), config.ffn_threshold, jnp.float32)

    def linear(path: str) -> Linear:
        return Linear(found[f"{path}/rows"], found.get(f"{path}/bias"))

    def layer(path: str) -> Layer:
        return Layer(
            found[f"{path}/input_norm"],
            AttentionWeights(*(linear(f"{path}/attention/{name}") for name in ("q", "k", "v", "o"))),
            found[f"{path}/post_attention_norm"],
            FFNWeights(*(found.get(f"{path}/ffn/{name}") for name in ("gate", "up", "down_t")), threshold),
        )

    layers = tuple(layer(f"layers/{i}") for i in range(config.num_layers))
    return Weights(found["embed"], layers, found["norm"], found.get("head"))


def by_path(tree: Any) -> dict[str, Matrix | Array]:
    """Every stored matrix and vector of a pytree of weights by its path; a low-bit matrix is one entry."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Rows))
    named = {"/".join(_name(entry) for entry in path): leaf for path, leaf in leaves}
    return {path: leaf for path, leaf in named.items() if not path.endswith("ffn/threshold")}


def _name(entry: Any) -> str:
    return str(next(getattr(entry, kind) for kind in ("name", "idx", "key") if hasattr(entry, kind)))


def random_weights(config: ModelConfig, key: Array) -> Weights:
    """Weights to train from: matrices keep the variance of what they multiply, embeddings have deviation 0.02."""

    def leaf(path: str, entry: Parameter) -> Array:
        if entry.role in ("norm", "bias"):
            return jnp.full(entry.shape, float(entry.role == "norm"))
        # down_t is stored the other way round, so its inputs are its rows.
        inputs = entry.shape[0 if path.endswith("down_t") else 1]
        deviation = 0.02 if entry.role in ("embed", "head") else inputs**-0.5
        return deviation * jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), entry.shape)

    return make_weights(config, leaf)


def check_weights(weights: Weights, config: ModelConfig) -> None:
    """Raises: JsparseError: weights are missing, unknown or of another shape than the config's; some are listed."""
    if not isinstance(weights, Weights):
        raise JsparseError(f"the weights are of type {type(weights).__name__}; they must be jsparse.Weights")
    check_leaves(by_path(weights), config)
    thresholds = {id(layer.ffn.threshold): layer.ffn.threshold for layer in weights.layers}  # most share one array
    wanted = np.full((config.intermediate_size,), config.ffn_threshold, np.float32)
    if not all(np.array_equal(threshold, wanted) for threshold in thresholds.values()):
        raise JsparseError(
            f"the thresholds of the FFNs are not the configuration's ffn_threshold {config.ffn_threshold}; make the "
            "weights anew for another one (jsparse.load, jsparse.model.parameters.make_weights)"
        )


def check_leaves(leaves: dict[str, Matrix | Array], config: ModelConfig) -> None:
    """`check_weights` of arrays by their path."""
    wanted = {path: entry.shape for path, entry in parameters(config).items()}
    if problems := _no_arrays(leaves):
        raise JsparseError(f"the weights do not fit the config: {listing(problems, between='; ')}")
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    problems = [f"{path} is missing" for path in wanted.keys() - found.keys()]
    problems += [f"{path} is unknown" for path in found.keys() - wanted.keys()]
    problems += [
        f"{path} is {found[path]}, expected {wanted[path]}"
        for path in wanted.keys() & found.keys()
        if found[path] != wanted[path]
    ]
    problems += _no_floats(leaves)
    if problems:
        raise JsparseError(f"the weights do not fit the config: {listing(sorted(problems), between='; ')}")


def _no_arrays(leaves: dict[str, Any]) -> list[str]:
    """Describe the leaves that are not arrays."""
    return [
        f"{path} is of type {type(leaf).__name__}, expected an array"
        for path, leaf in leaves.items()
        if not isinstance(leaf, Rows | jax.Array | np.ndarray)
    ]


def _no_floats(leaves: dict[str, Matrix | Array]) -> list[str]:
    """Describe the arrays whose dtype no executor reads as floats."""
    return [
        f"{path} is of {leaf.dtype}, expected one of {', '.join(_FLOATS)}"
        for path, leaf in leaves.items()
        if not isinstance(leaf, Rows) and str(leaf.dtype) not in _FLOATS
    ]


def check_params(params: Any) -> None:
    """Raises: JsparseError: it is no `Params`, or its weights or predictors are not those of its configuration."""
    check_predictors(params)
    check_weights(params.weights, params.config)


def check_predictors(params: Any) -> None:
    """Raises: JsparseError: it is no `Params`, or its predictors' number or shapes are not those of the model."""
    if not isinstance(params, Params):
        raise JsparseError(f"params is of type {type(params).__name__}; it must be a model from jsparse.load")
    if params.predictors is None:
        return
    c = params.config
    if not c.is_sparse:
        raise JsparseError(f"there are predictors, but a {c.ffn_kind} FFN has no zero neurons to predict")
    if not isinstance(params.predictors, tuple | list) or not all(isinstance(p, Predictor) for p in params.predictors):
        raise JsparseError("params.predictors must be a tuple of jsparse.Predictor, one for each layer, or None")
    if len(params.predictors) != c.num_layers:
        raise JsparseError(f"there are {len(params.predictors)} predictors for a model of {c.num_layers} layers")
    parts = {
        f"layer {layer} {name}": part
        for layer, predictor in enumerate(params.predictors)
        for name in ("a", "b", "bias", "rate")
        if (part := getattr(predictor, name)) is not None or name != "rate"
    }
    if problems := _no_arrays(parts) or _no_floats(parts):
        raise JsparseError(f"the predictors cannot be used: {listing(problems, between='; ')}")
    problems = []
    for layer, predictor in enumerate(params.predictors):
        wanted = {"a": (predictor.rank, c.hidden_size), "b": (c.intermediate_size, predictor.rank)}
        wanted["bias"] = (c.intermediate_size,)
        if predictor.rate is not None:
            wanted["rate"] = (c.intermediate_size,)
        for name, shape in wanted.items():
            found = getattr(predictor, name).shape
            if found != shape:
                problems.append(f"layer {layer} {name} has shape {found}, the model needs {shape}")
    if problems:
        raise JsparseError("the predictors belong to another model: " + "; ".join(problems))
