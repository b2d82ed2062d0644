"""Low-rank predictors of the active neurons: truncation-aware SVD of the gate projection, then low-bit rounding.

The SVD is SVDP's (arXiv 2603.14110): whiten the gate with the calibration data, so that truncating its singular
values is optimal for the data and not only for the matrix. The rounding and the clipped refit are this project's.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

from jsparse.arrays import Matrix, Storage, dequantize
from jsparse.errors import JsparseError
from jsparse.rounding import quantize_rows
from jsparse.typing import Array, Float

BITS = (16, 8, 4)
_NEURON_BLOCK = 128
_TOKEN_BLOCK = 2048
_DAMPING = 1e-12
_NEGLIGIBLE = 1e-8
_CLIP = 0.5
"""Standard deviations below its mean where a gate value is clipped for the fit (docs/log.md)."""
_EVENING = 0.75
"""Power of its root mean square by which a column of b is divided; the best of 0, 1/4, ..., 1 (docs/log.md)."""


def fit_svd(
    gate: Float[Array, "F D"], gram: Float[Array, "_ _"], rank: int, *, whiten: bool = True
) -> tuple[Float[Array, "R D"], Float[Array, "F R"]]:
    """The rank-r map b a nearest to the gate on the data that `gram` summarises.

    With gram = S S^T and gate S = U diag(sigma) V^T: a = V_r^T S^-1, b = gate S V_r, and the squared error over the
    data, ||(gate - b a) S||_F^2, is the sum of sigma_i^2 for i > r. V comes from an eigendecomposition of the (D, D)
    matrix S^T gate^T gate S; nothing of size (F, F) is formed. Computed in float64.

    Args:
      gate: gate projection, one row per neuron.
      gram: X^T X of the FFN inputs X (n, D), or their covariance. It may be singular: channels are scaled to unit
        variance and the matrix is damped by the least multiple of the identity that lets it factorise.
      rank: 1 to D.
      whiten: False ignores the data and truncates the SVD of the gate itself (ablation).

    Returns:
      a and b, in the gate's dtype if it is float64, else float32.

    Raises:
      JsparseError: the rank or a shape does not fit.
    """
    hidden_size = gate.shape[1]
    check_rank(rank, hidden_size)
    if gram.shape != (hidden_size, hidden_size):
        raise JsparseError(f"gram has shape {gram.shape}; the gate {gate.shape} needs ({hidden_size}, {hidden_size})")
    if not isinstance(gram, jax.core.Tracer) and not np.isfinite(gram).all():
        raise JsparseError("gram has NaN or infinite entries; the activations it was made of are damaged")
    dtype = jnp.float64 if gate.dtype == jnp.float64 else jnp.float32
    with jax.enable_x64(True):
        a, b = _fit_svd(jnp.asarray(gate, jnp.float64), jnp.asarray(gram, jnp.float64), rank, whiten)
        return a.astype(dtype), b.astype(dtype)


def fit_low_bit(
    gate: Float[Array, "F D"],
    x: Float[np.ndarray, "n D"],
    rank: int,
    *,
    bits: int = 4,
    whiten: bool = True,
    center: bool = True,
    refit: bool = True,
    threshold: float = 0.0,
) -> tuple[Matrix, Matrix, Float[Array, "F"]]:
    """The predictor of `fit_svd` in `bits` bits, its second factor fitted to what the prediction needs.

    a's rows are scaled to features of unit variance and rounded. b is fitted by least squares on the features that the
    rounded a really gives. Its target is the gate's value clipped from below, half a standard deviation under its
    mean: how far below the threshold an inactive neuron lies does not matter, and to reproduce it costs accuracy near
    the threshold (measured in docs/log.md). b's columns are evened out, and it is rounded in turn.

    Args:
      gate, rank, whiten: as in `fit_svd`.
      x: FFN inputs of the calibration tokens.
      bits: 16 (bfloat16), 8 or 4.
      center: False fits x and not its deviation from the mean (ablation); the offset is then 0.
      refit: False keeps the SVD's b (the published recipe).
      threshold: a neuron is active where its gate value exceeds this; no value above it is clipped.

    Returns:
      a, b and the offset (F,): b a x + offset estimates the clipped gate x, or without `refit` gate x itself.

    Raises:
      JsparseError: the rank, a shape or `bits` is out of range.
    """
    if bits not in BITS:
        raise JsparseError(f"bits is {bits}; a predictor has 16, 8 or 4")
    mean = x.mean(axis=0, dtype=np.float64) if center else np.zeros(x.shape[1])
    gram = _gram(x, mean)
    with jax.enable_x64(True):
        a, b = fit_svd(jnp.asarray(gate, jnp.float64), gram, rank, whiten=whiten)
        a, scale = _round_features(a, gram, bits)
        if refit:
            b, level = _fit_clipped(gate, x, mean, dequantize(a), threshold)
        else:
            b, level = b * scale, gate @ mean
        a, b = _round_weights(a, b, bits)
        offset = level - _estimate(a, b, mean) if center else jnp.zeros_like(level)
        return a, b, offset.astype(jnp.float32)


def check_rank(rank: int, hidden_size: int) -> None:
    """Raises: JsparseError: the rank is not in 1..hidden_size."""
    if not 1 <= rank <= hidden_size:
        raise JsparseError(f"rank is {rank}; it must be between 1 and the hidden size {hidden_size}")


@partial(jax.jit, static_argnames=("rank", "whiten"))
def _fit_svd(gate, gram, rank, whiten):
    if not whiten:
        _, vectors = jnp.linalg.eigh(gate.T @ gate)
        v = vectors[:, : -rank - 1 : -1]
        return v.T, gate @ v
    root = _whitening_root(gram)
    _, vectors = jnp.linalg.eigh(root.T @ ((gate.T @ gate) @ root))
    v = vectors[:, : -rank - 1 : -1]
    a = jax.scipy.linalg.solve_triangular(root, v, lower=True, trans=1).T
    return a, gate @ (root @ v)


def _whitening_root(gram):
    """Lower triangular S with S S^T = gram, up to the damping a singular gram needs.

    Outlier channels have a thousand times the deviation of others, so the damping is relative to each channel's own
    variance. It starts at the rounding error of float64 and is raised tenfold until the factorisation succeeds.
    """
    deviation = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    deviation = jnp.where(deviation > 0, deviation, 1)
    correlation = gram / (deviation[:, None] * deviation)

    def factor(damping):
        return deviation[:, None] * jnp.linalg.cholesky(correlation + damping * jnp.eye(gram.shape[0]))

    def raise_damping(carry):
        damping = 10 * carry[0]
        return damping, factor(damping)

    def failed(carry):
        return (carry[0] < 1) & ~jnp.isfinite(carry[1]).all()

    start = jnp.float64(_DAMPING)
    return jax.lax.while_loop(failed, raise_damping, (start, factor(start)))[1]


def _gram(x: Float[np.ndarray, "n D"], mean: Float[np.ndarray, "D"]) -> Float[np.ndarray, "D D"]:
    """(x - mean)^T (x - mean) / n: float32 products of a block of tokens, summed in float64."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(x), _TOKEN_BLOCK):
        block = (x[start : start + _TOKEN_BLOCK] - mean).astype(np.float32)
        total += block.T @ block
    return total / len(x)


@partial(jax.jit, static_argnames="bits")
def _round_features(a, gram, bits):
    """a rounded, so that its features have unit variance, and the deviation (R,) of the features before."""
    root = _whitening_root(gram)

    def deviations(a):
        deviation = jnp.linalg.norm(a @ root, axis=1)
        return jnp.where(deviation > 0, deviation, 1)

    before = deviations(a)
    a = a / before[:, None]
    if bits == 16:
        return a.astype(jnp.bfloat16), before
    a = quantize_rows(a, Storage(f"int{bits}"))
    after = deviations(dequantize(a).astype(jnp.float64))
    return dataclasses.replace(a, scale=(a.scale / after[:, None]).astype(jnp.float32)), before * after


def _fit_clipped(gate, x, mean, a, threshold):
    """b and the level (F,) of the least-squares fit of the clipped gate on the features a (x - mean)."""
    a = np.asarray(a, np.float64).T
    blocks = (x[start : start + _TOKEN_BLOCK] for start in range(0, len(x), _TOKEN_BLOCK))
    features = np.concatenate([(block - mean) @ a for block in blocks])
    variances, directions = np.linalg.eigh(features.T @ features / len(x))
    # A feature may depend on others; a direction in which they hardly vary gets no weight.
    whitener = directions * np.where(variances > _NEGLIGIBLE, variances, np.inf) ** -0.5
    tokens, whitened = jnp.asarray(x, jnp.float32), jnp.asarray(features @ whitener, jnp.float32)
    blocks = (gate[start : start + _NEURON_BLOCK] for start in range(0, len(gate), _NEURON_BLOCK))
    b, level = zip(*(_clipped_block(jnp.asarray(g, jnp.float32), tokens, whitened, threshold) for g in blocks))
    return jnp.concatenate(b) @ whitener.T, jnp.concatenate(level)


@jax.jit
def _clipped_block(gate, x, whitened, threshold):
    value = jnp.matmul(gate, x.T, precision="highest")
    floor = jnp.minimum(value.mean(axis=1), threshold) - _CLIP * value.std(axis=1)
    value = jnp.maximum(value, floor[:, None].astype(jnp.float32))
    return jnp.matmul(value, whitened, precision="highest") / len(x), value.mean(axis=1)


@partial(jax.jit, static_argnames="bits")
def _round_weights(a, b, bits):
    """b rounded, and a, which takes what evens out b's columns.

    The singular values fall steeply, and a row of b with one scale would spend its few levels on the first columns.
    """
    if bits == 16:
        return a, b.astype(jnp.bfloat16)
    column = jnp.sqrt(jnp.mean(b**2, axis=0))
    column = jnp.where(column > 0, column, 1) ** _EVENING
    a = dataclasses.replace(a, scale=(a.scale * column[:, None]).astype(jnp.float32))
    return a, quantize_rows(b / column, Storage(f"int{bits}"))


def _estimate(a, b, x):
    return dequantize(b).astype(jnp.float64) @ (dequantize(a).astype(jnp.float64) @ x)
