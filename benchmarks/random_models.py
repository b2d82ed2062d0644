"""Random weights of published shapes with the published sparsity, and predictors that find it.

The gate projection is the product of two low-bit factors, which are the predictor, so that the predicted and the active
neurons of random inputs are nested as a fitted predictor's are. The FFN is FATReLU with the threshold that a tenth of
the gate values pass; what a neuron costs does not depend on its kind.
"""

import dataclasses
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

import jsparse
from jsparse.arrays import Matrix, Rows, Storage, aligned_empty, dequantize
from jsparse.model.parameters import Role, weight_storage
from jsparse.model.weights import FFNWeights, Predictor
from jsparse.rounding import cast

ACTIVE = 0.1
_LEADING_ENERGY = 0.95
"""Share of the gate's variance in its first components: those of the narrow 16-bit predictor."""
_INT4_DEVIATION = np.sqrt((7 * 8) / 3)
"""Of whole numbers drawn evenly from -7 to 7."""


_PUBLISHED = {"Llama-2-7B": (256, 0.5), "Mistral-7B": (352, 0.7), "Qwen2-7B": (512, 0.7), "MiniCPM-1B": (96, 0.7)}
"""Rank and s by shape: of SVDP's table, and for the last one chosen like them."""


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """A predictor's rank, bits per element, and share of neurons that it predicts."""

    name: str
    rank: int
    bits: int
    predicted: float


def operating_points(shape: str, config: jsparse.ModelConfig) -> tuple[OperatingPoint, OperatingPoint]:
    """The published one (16 bits) and ours (4 bits at a quarter of the width, s .95)."""
    rank, s = _PUBLISHED.get(shape, (config.hidden_size // 16, 0.7))
    published = OperatingPoint("published", rank, 16, 1 - s * (1 - ACTIVE))
    return published, OperatingPoint("ours", config.hidden_size // 4, 4, 0.11)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's FFN in bfloat16 and the factors of its gate."""

    ffn: FFNWeights
    a: Rows
    b: Rows

    def stored(self, dtype: str) -> FFNWeights:
        """The FFN in its own memory, in that dtype."""
        matrices = (store(m, dtype) for m in (self.ffn.gate, self.ffn.up, self.ffn.down_t))
        return FFNWeights(*matrices, self.ffn.threshold)

    def predictor(self, point: OperatingPoint) -> Predictor:
        """A predictor of that rank and bits that predicts that share of the neurons of a normalised input."""
        if point.bits == 4:
            a, b = self.a, self.b
        else:
            a = dequantize(self.a)[: point.rank].astype(jnp.bfloat16)
            b = dequantize(self.b)[:, : point.rank].astype(jnp.bfloat16)
        spread = 1.0 if point.rank >= self.a.shape[0] else np.sqrt(_LEADING_ENERGY)
        quantile = NormalDist(0, spread).inv_cdf(1 - point.predicted)
        return Predictor(a, b, jnp.full((b.shape[0],), -quantile, jnp.float32))


def random_layer(config: jsparse.ModelConfig, leading_rank: int, seed: int = 0) -> Layer:
    """A layer whose gate values have unit variance on normalised inputs."""
    rng = np.random.default_rng(seed)
    width, neurons = config.hidden_size, config.intermediate_size
    rank = width // 4
    energy = np.full(rank, (1 - _LEADING_ENERGY) / max(1, rank - leading_rank))
    energy[:leading_rank] = _LEADING_ENERGY / leading_rank

    def int4(rows, columns, scale):
        nibbles = rng.integers(1, 16, (2, rows, columns // 2), np.uint8)
        scale = jnp.asarray(np.broadcast_to(np.reshape(scale, (-1, 1)) / _INT4_DEVIATION, (rows, 1)), jnp.float32)
        return Rows(jnp.asarray(nibbles[0] | nibbles[1] << 4), scale, Storage("int4"), columns)

    a = int4(rank, width, np.sqrt(energy / width))
    b = int4(neurons, rank, 1.0)
    gate = (dequantize(b) @ dequantize(a)).astype(jnp.bfloat16)
    up, down_t = (random_matrix(rng, neurons, width, width**-0.5) for _ in range(2))
    return Layer(FFNWeights(gate, up, down_t, jnp.full((neurons,), threshold(), jnp.float32)), a, b)


def random_matrix(rng: np.random.Generator, rows: int, columns: int, deviation: float) -> jax.Array:
    """Normal values in bfloat16."""
    return jnp.asarray(rng.standard_normal((rows, columns), np.float32) * np.float32(deviation)).astype(jnp.bfloat16)


def threshold() -> float:
    """The FATReLU threshold that a share ACTIVE of the gate values pass."""
    return NormalDist().inv_cdf(1 - ACTIVE)


def store(matrix: Matrix, dtype: str, role: Role = "matrix") -> Matrix:
    """The matrix in its own memory, as a model of that dtype stores one of that role."""
    storage = weight_storage(role, dtype)
    stored = matrix if storage is None else cast(matrix, str(storage))
    return stored if stored is not matrix else jax.tree.map(copy, matrix)


def copy(array: jax.Array) -> jax.Array:
    """The array in memory of its own, on the host as a loaded checkpoint's is."""
    if next(iter(array.devices())).platform != "cpu":
        return jnp.copy(array)
    new = aligned_empty(array.shape, array.dtype)
    new[...] = array
    return jax.device_put(new)
