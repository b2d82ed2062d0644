"""Native kernels for decoding on a CPU, as JAX functions: arrays in, arrays out.

A matrix argument is an array (rows, columns) of float32, bfloat16 or float16, or low-bit rows:

- `(values, scale)`: values (rows, columns) int8, or (rows, ceil(columns / 2)) uint8 with two 4-bit elements per byte
  (q + 8, the even one in the low nibble), and scale (rows, 1) float32;
- `(values, codebook)`: groups of 32 columns share a scale. A row of values, uint8, has two codes of 0 to 15 per byte,
  ceil(columns / 2), and behind them ceil(columns / 32) float16 scales; codebook (16,) int8 says what a code is.

Matrices are (out, in); nothing copies them. Vectors are float32, one per row. Low-bit rows meet vectors rounded to 16
bits, one step per vector, in integer products. Sums over floats are accumulated in float32, in one order: the result of
a token has the same bits for any number of threads and whatever other tokens stand beside it.
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

try:
    _native = importlib.import_module("cpu_kernels._native")
except ModuleNotFoundError:
    _native = None
    _MISSING = (
        f"it is not in {Path(__file__).parent}: it needs a C++ compiler when jsparse is installed, and a clone that "
        "Python runs from needs pip install -e"
    )
except ImportError as error:
    _native, _MISSING = None, str(error)

ACTIVATIONS = ("relu", "relu2", "silu")
UP_ACTIVATIONS = ("none", "linear", "relu")
"""What may be applied to gate and up values, in the order of the native enumerations; `none` where there is no up."""
_PREFIX = "jsparse_cpu_"
_IN_PLACE = {5: 1, 6: 2, 7: 3, 8: 4}
"""The operands of `attend` that it updates in place, caches and their scales, and the results that they become."""

Matrix = jax.Array | tuple[jax.Array, jax.Array]

if _native is not None:
    for _name, _handler in _native.handlers().items():
        jax.ffi.register_ffi_target(f"{_PREFIX}{_name}", _handler, platform="cpu")


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    if _native is None:
        return f"the native extension is missing: {_MISSING}"
    if jax.default_backend() != "cpu":
        return f"JAX computes on {jax.default_backend()} here; JAX_PLATFORMS=cpu chooses the CPU"
    return None


def native_names() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The native enumerations behind ACTIVATIONS and UP_ACTIVATIONS."""
    return _native.activations(), _native.up_activations()


def instruction_set() -> str:
    """Which of the compiled kernels this processor runs: avx512vnni, avx512, avx2 or baseline."""
    return _native.instruction_set()


def num_threads() -> jax.Array:
    """Threads of the pool the kernels share with XLA, () int32."""
    return _call("threads", jax.ShapeDtypeStruct((1,), jnp.int32))()[0]


def take_rows(matrix: Matrix, indices: jax.Array, columns: int) -> jax.Array:
    """Rows of a matrix (rows, columns) in float32, (n, columns), for indices (n,); one outside gives zeros."""
    out = jax.ShapeDtypeStruct((indices.shape[0], columns), jnp.float32)
    return _call("take_rows", out)(indices.astype(jnp.int32), *_flatten([matrix]))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x (B, D) over the root of its mean square plus eps, times scale (D,)."""
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return _call("rms_norm", out)(_float32(x), _float32(scale), eps=np.float32(eps))


def linear(x: jax.Array, *weights: Matrix) -> tuple[jax.Array, ...]:
    """x (B, D) times the transpose of each matrix (out, D): one (B, out) per matrix, in one pass over the threads."""
    outs = [jax.ShapeDtypeStruct((x.shape[0], _rows(weight)), jnp.float32) for weight in weights]
    return tuple(_call("linear", outs)(_float32(x), *_flatten(weights)))


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
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    arrays = _flatten((gate, up, down_t))
    return _call("dense_ffn", out)(_float32(x), *arrays, _float32(threshold), **_codes(up, activation, up_activation))


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
) -> tuple[jax.Array, jax.Array]:
    """The FFN over the neurons j with (b a x + bias)_j > 0, and no row of another neuron read.

    Args:
      x: (B, D).
      gate, up, down_t: (F, D); up may be None.
      threshold: (F,).
      a, b, bias: (R, D), (F, R), (F,); the predictor.
      activation, up_activation: as in `dense_ffn`; silu has no zeros and is refused.
      parallel: compute gate and up of all predicted neurons; otherwise up of those that survive the gate alone.
      route: (B, E), what scales the hidden values of each token's neurons, which are E groups of F / E; where it is
        zero a group is neither scored nor read. None for ones.

    Returns:
      y (B, D), and counts (B, 2) int32: neurons predicted, and those of them whose hidden value is not zero.
    """
    outs = [jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.ShapeDtypeStruct((x.shape[0], 2), jnp.int32)]
    route = jnp.ones((x.shape[0], 1)) if route is None else route
    arrays = *_flatten((gate, up, down_t)), _float32(threshold), *_flatten((a, b)), _float32(bias), _float32(route)
    options = _codes(up, activation, up_activation) | {"parallel": np.bool_(parallel)}
    return tuple(_call("sparse_ffn", outs)(_float32(x), *arrays, **options))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    count: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    scales: tuple[jax.Array, ...] = (),
    *,
    window: int | None = None,
) -> tuple[jax.Array, ...]:
    """Attention of new tokens of each sequence over its KV cache, which takes their keys and values first.

    Args:
      q: (B, T, N, H) queries, rotated.
      k, v: (B, T, K, H), keys and values of the same tokens; N is a multiple of K.
      start: (B,) int32, the position of each sequence's first token.
      count: (B,) int32, how many of its tokens exist; the others write nothing, and zeros come out.
      keys, values: (B, S, K, H) float32, bfloat16, float16 or int8; slot s holds the newest position p with p % S == s.
      scales: of int8 the bfloat16 scales of keys and of values, (B, S, K, ceil(H / 32)): one for every 32 channels.
        Queries meet int8 keys rounded to 16 bits, one step per query.
      window: positions a token sees, itself included; None for all. It sees S of them at most.

    Returns:
      the attended values (B, T, N, H), and the caches with the scales they have, updated in place where the caller
      does not use them again.
    """
    caches = keys, values, *(scales or [jnp.zeros((0,), jnp.float32)] * 2)
    outs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in caches]
    call = _call("attend", [jax.ShapeDtypeStruct(q.shape, jnp.float32), *outs], input_output_aliases=_IN_PLACE)
    new = (*map(_float32, (q, k, v)), *(x.astype(jnp.int32) for x in (start, count)))
    out, *caches = call(*new, *caches, window=np.int64(2**62 if window is None else window))
    return out, *(caches if scales else caches[:2])


@jax.jit
def read(data: jax.Array) -> jax.Array:
    """Read every byte of the array with all threads; () uint32 that depends on them. A probe of memory bandwidth."""
    return _call("read", jax.ShapeDtypeStruct((1,), jnp.uint32))(data)[0]


def _call(name, outs, **options):
    return jax.ffi.ffi_call(f"{_PREFIX}{name}", outs, **options)


def _codes(up: Matrix | None, activation: str, up_activation: str) -> dict:
    up_activation = "none" if up is None else up_activation
    return {
        "activation": np.int64(ACTIVATIONS.index(activation)),
        "up_activation": np.int64(UP_ACTIVATIONS.index(up_activation)),
    }


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _rows(matrix: Matrix) -> int:
    return (matrix[0] if isinstance(matrix, tuple) else matrix).shape[0]


def _flatten(matrices) -> list[jax.Array]:
    """Values and scale, or codebook, of every matrix that is there; the scale of a plain one is empty."""
    empty = jnp.zeros((0,), jnp.float32)
    return [part for m in matrices if m is not None for part in (m if isinstance(m, tuple) else (m, empty))]
