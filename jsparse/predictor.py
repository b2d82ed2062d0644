"""Low-rank predictors of the active neurons: truncation-aware SVD of the gate projection, then low-bit rounding.

The construction is SVDP's (arXiv 2603.14110): whiten the gate with the calibration data, so that truncating its
singular values is optimal for the data and not only for the matrix.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np

from jsparse.errors import JsparseError
from jsparse.quantization import Matrix, dequantize, quantize_rows
from jsparse.typing import Array, Float

BITS = (16, 8, 4)
_DAMPING = 1e-12
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
    gram: Float[Array, "D D"],
    mean: Float[Array, "D"],
    rank: int,
    *,
    bits: int = 4,
    whiten: bool = True,
    refit: bool = True,
) -> tuple[Matrix, Matrix, Float[Array, "F"]]:
    """The predictor of `fit_svd` in `bits` bits, corrected for the rounding of its first factor.

    a's rows are scaled to features of unit variance and rounded; b is refitted by least squares on the features that
    the rounded a really gives, its columns are evened out, and it is rounded in turn.

    Args:
      gate, gram, rank, whiten: as in `fit_svd`; a covariance gram for a centred fit.
      mean: what was subtracted from the data to get `gram`; zeros for an uncentred fit.
      bits: 16 (bfloat16), 8 or 4.
      refit: False keeps the SVD's b (the published recipe).

    Returns:
      a, b and the offset (F,), so that b a x + offset estimates gate x.

    Raises:
      JsparseError: the rank, a shape or `bits` is out of range.
    """
    if bits not in BITS:
        raise JsparseError(f"bits is {bits}; a predictor has 16, 8 or 4")
    with jax.enable_x64(True):
        gate, gram, mean = (jnp.asarray(array, jnp.float64) for array in (gate, gram, mean))
        a, b = fit_svd(gate, gram, rank, whiten=whiten)
        a, b, offset = _round(gate, gram, mean, a, b, bits, refit)
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


@partial(jax.jit, static_argnames=("bits", "refit"))
def _round(gate, gram, mean, a, b, bits, refit):
    root = _whitening_root(gram)

    def rounded(matrix, bits):
        return matrix.astype(jnp.bfloat16) if bits == 16 else quantize_rows(matrix, bits)

    def deviations(features):
        deviation = jnp.linalg.norm(features @ root, axis=1)
        return jnp.where(deviation > 0, deviation, 1)

    scale = deviations(a)
    a = rounded(a / scale[:, None], bits)
    features = dequantize(a).astype(jnp.float64)
    deviation = deviations(features)
    if refit:
        # Least squares of gate x on the features: b = (gate S)(features S)^+, through a thin QR of (features S)^T.
        # A feature that depends on earlier ones gets no weight.
        q, r = jnp.linalg.qr((features / deviation[:, None] @ root).T)
        dependent = jnp.abs(jnp.diagonal(r)) < 1e-6
        r = jnp.where(dependent[:, None] | dependent, jnp.eye(r.shape[0]), r)
        target = jnp.where(dependent, 0, gate @ (root @ q))
        b = jax.scipy.linalg.solve_triangular(r, target.T).T
    else:
        b = b * (scale * deviation)
    # The singular values fall steeply, and a row of b with one scale would spend its few levels on the first columns:
    # columns are evened out, and a takes the inverse.
    column = jnp.sqrt(jnp.mean(b**2, axis=0))
    column = jnp.where(column > 0, column, 1) ** _EVENING
    b = rounded(b / column, bits)
    factor = column / deviation
    if bits == 16:
        a = rounded(features * factor[:, None], bits)
    else:
        a = dataclasses.replace(a, scale=(a.scale * factor).astype(jnp.float32))
    features = dequantize(a).astype(jnp.float64)
    offset = gate @ mean - dequantize(b).astype(jnp.float64) @ (features @ mean)
    return a, b, offset
