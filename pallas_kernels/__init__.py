"""Pallas kernels for decoding on an NVIDIA GPU, as JAX functions: arrays in, arrays out.

A matrix argument is an array (rows, columns) of float32, bfloat16 or float16, or low-bit rows `(values, scale)`: values
(rows, columns) int8, or (rows, ceil(columns / 2)) uint8 with two 4-bit elements per byte (q + 8, the even one in the
low nibble), and scale (rows, 1) float32; or `(values, codebook)`: two codes of 0 to 15 per byte of uint8, behind them a
row's float16 scales of every 32 columns, and codebook (16,) int8 or float32, which says what a code is; float32 is
faster, because a lookup is then all. Matrices are (out, in). Activations and sums are float32.

Lowered for another device than a GPU, the kernels are interpreted: slow, and meant for tests. The functions are jitted,
so that a program of many layers traces and lowers each of them once.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import kernels, products
from pallas_kernels.attention import attend
from pallas_kernels.kernels import Matrix, is_grouped, values_of
from pallas_kernels.tiles import Tiles, choose

__all__ = ["Matrix", "Tiles", "attend", "dense_ffn", "linear", "sparse_ffn", "take_rows", "unavailable"]

_OLDEST = (8, 0)
_ACTIVATIONS: dict[str, Callable] = {
    "relu": lambda gate, threshold: jnp.where(gate > threshold, gate, 0),
    "relu2": lambda gate, threshold: jnp.where(gate > threshold, gate * gate, 0),
    "silu": lambda gate, threshold: jax.nn.silu(gate),
}
_UP_ACTIVATIONS: dict[str, Callable] = {"linear": lambda up: up, "relu": lambda up: jnp.maximum(up, 0)}
_WITHOUT_ZEROS = ("silu",)


def take_rows(matrix: Matrix, indices: jax.Array, columns: int) -> jax.Array:
    """Rows of a matrix (rows, columns) in float32, (n, columns), for indices (n,); one past the end gives zeros."""
    return products.take_rows(matrix, indices, columns)


@jax.jit
def linear(x: jax.Array, *weights: Matrix) -> tuple[jax.Array, ...]:
    """x (B, D) times the transpose of each matrix (out, D): one (B, out) per matrix."""
    return tuple(products.linear(x, weight) for weight in weights)


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        device = jax.devices("cuda")[0]
    except (RuntimeError, AssertionError):  # the latter where JAX_PLATFORMS asks for a plugin that is not installed
        if (allowed := jax.config.jax_platforms) and "cuda" not in allowed:
            return f"JAX finds no CUDA device: JAX_PLATFORMS is {allowed}, which leaves them out"
        return "JAX finds no CUDA device: pip install 'jax[cuda13]' and check that nvidia-smi lists a GPU"
    if device.platform != jax.default_backend():
        return f"JAX computes on {jax.default_backend()} here; JAX_PLATFORMS=cuda chooses the GPU"
    capability = device.compute_capability
    if tuple(int(part) for part in capability.split(".")) < _OLDEST:
        return f"the GPU ({device.device_kind}) has compute capability {capability}; the kernels need 8.0 or newer"
    return None


@partial(jax.jit, static_argnames=("activation", "up_activation"))
def dense_ffn(
    x: jax.Array,
    gate: Matrix,
    up: Matrix | None,
    down_t: Matrix,
    threshold: jax.Array,
    *,
    activation: str = "relu",
    up_activation: str = "linear",
) -> jax.Array:
    """down_t^T (phi(gate x) * psi(up x)), (B, D), for x (B, D), matrices (F, D) and threshold (F,).

    Args:
      up: None for an FFN of phi(gate x) alone.
      activation: phi, `relu` (which keeps what is greater than the neuron's threshold), `relu2`, its square, or `silu`.
      up_activation: psi, `linear` or `relu`.
    """
    phi, psi = _functions(activation, up_activation)
    x = x.astype(jnp.float32)
    hidden = phi(products.linear(x, gate), threshold)
    if up is not None:
        hidden = hidden * psi(products.linear(x, up))
    return products.transposed(hidden, down_t, x.shape[1])


@partial(jax.jit, static_argnames=("activation", "up_activation", "parallel", "tiles"))
def sparse_ffn(
    x: jax.Array,
    gate: Matrix,
    up: Matrix | None,
    down_t: Matrix,
    threshold: jax.Array,
    a: Matrix,
    b: Matrix,
    bias: jax.Array,
    *,
    activation: str = "relu",
    up_activation: str = "linear",
    parallel: bool = False,
    route: jax.Array | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The FFN over the neurons j with (b a x + bias)_j > 0, and no row of another neuron read.

    Args:
      x: (B, D), every sequence with its own neurons.
      gate, up, down_t: (F, D), of floats, int8 rows, or 4 bits with a codebook; up may be None.
      threshold: (F,) float32.
      a, b, bias: (R, D), (F, R), (F,); the predictor.
      activation, up_activation: as in `dense_ffn`; silu has no zeros and is refused.
      parallel: read gate and up of all predicted neurons; otherwise up of those that survive the gate alone.
      route: (B, E), what scales the hidden values of each token's neurons, which are E groups of F / E; where it is
        zero a group is neither scored nor read. None for ones.
      tiles: sizes; None for those of the GPU, shape and dtype.

    Returns:
      y (B, D), and counts (B, 2) int32: neurons predicted, and those of them whose hidden value is not zero.

    Raises:
      ValueError: a matrix has the wrong shape or dtype, or the activation has no zeros.
    """
    phi, psi = _functions(activation, up_activation)
    _check(x, gate, up, down_t, threshold, a, b, bias, activation, route)
    if tiles is None:
        tiles = choose(bias.shape[0], x.shape[1], str(values_of(gate).dtype))
    x = x.astype(jnp.float32)
    survivors, hidden, counts = kernels.predict_gate_up(
        x,
        products.linear(x, a),
        b,
        bias,
        gate,
        up,
        threshold,
        route,
        phi=phi,
        psi=psi,
        parallel=parallel,
        tiles=tiles,
    )
    partial, totals = kernels.down(survivors, hidden, counts, down_t, x.shape[1], tiles=tiles)
    return jnp.sum(partial, axis=1), totals


def _functions(activation: str, up_activation: str) -> tuple[Callable, Callable]:
    """phi and psi."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(_ACTIVATIONS)}")
    if up_activation not in _UP_ACTIVATIONS:
        raise ValueError(f"up_activation is {up_activation!r}; it must be one of {', '.join(_UP_ACTIVATIONS)}")
    return _ACTIVATIONS[activation], _UP_ACTIVATIONS[up_activation]


_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def _check(x, gate, up, down_t, threshold, a, b, bias, activation: str, route) -> None:
    if x.ndim != 2 or bias.ndim != 1 or 0 in x.shape or 0 in bias.shape:
        raise ValueError(f"x and bias have shapes {x.shape} and {bias.shape}; they must be (B, D) and (F,), not empty")
    problems = []
    if activation in _WITHOUT_ZEROS:
        problems.append(f"activation is {activation!r}, which has no zeros to skip")
    width, (num_neurons,), rank = x.shape[1], bias.shape, values_of(a).shape[0]
    if threshold.shape != bias.shape:
        problems.append(f"threshold has shape {threshold.shape}, bias {bias.shape}; they must be the same")
    if route is not None and (route.ndim != 2 or len(route) != len(x) or num_neurons % max(route.shape[1], 1)):
        problems.append(f"route has shape {route.shape}, which is no group of {num_neurons} neurons of {len(x)} tokens")
    neurons = (num_neurons, width)
    wanted = {"gate": (gate, neurons), "up": (up, neurons), "down_t": (down_t, neurons)}
    wanted |= {"a": (a, (rank, width)), "b": (b, (num_neurons, rank))}
    if up is None:
        del wanted["up"]
    for name, (matrix, (rows, columns)) in wanted.items():
        values, dtype = values_of(matrix), values_of(matrix).dtype
        grouped = is_grouped(matrix)
        stored = (rows, -(-columns // 2) + 2 * grouped * -(-columns // 32) if dtype == jnp.uint8 else columns)
        if values.shape != stored:
            problems.append(f"{name} has shape {values.shape}, which is not that of ({rows}, {columns})")
        if not isinstance(matrix, tuple) and dtype not in _FLOATS:
            problems.append(f"{name} is {dtype} without scales")
        if grouped:
            if dtype != jnp.uint8 or matrix[1].shape != (16,) or name in ("a", "b"):
                problems.append(
                    f"{name} is {dtype} with a codebook of {matrix[1].shape}; weights of uint8 take one of (16,)"
                )
            continue
        if isinstance(matrix, tuple) and (dtype not in (jnp.int8, jnp.uint8) or matrix[1].shape != (rows, 1)):
            problems.append(f"{name} is {dtype} with scales {matrix[1].shape}; int8 or uint8 with ({rows}, 1) is known")
        if dtype == jnp.uint8 and name in ("gate", "up", "down_t"):
            problems.append(
                f"{name} has 4 bits and one scale per row; the kernels read weights with one per 32 columns"
            )
        if values.size >= 2**31:
            problems.append(f"{name} has {values.size} elements; the kernels count to 2^31")
    if problems:
        raise ValueError("; ".join(problems))
