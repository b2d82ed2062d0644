"""The custom ops inside jitted JAX: the weights stay on the device and are found by handle, only x and y cross."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cann_bridge.devices import import_torch
from cann_bridge.handover import Matrix, arrays_of, held, hold, resident, resident_predictor
from cann_bridge.ops import ops


def place_ffn(
    gate: Matrix, up: Matrix | None, down_t: Matrix, threshold: jax.Array, device, width: int | None = None
) -> jax.Array:
    """A handle of the matrices (F, D) and the threshold (F,) on the device; packed rows do not tell their width D."""
    arrays = sum((arrays_of(part) for part in (gate, up, down_t, threshold) if part is not None), ())
    matrices = (None if matrix is None else resident(matrix, device, columns=width) for matrix in (gate, up, down_t))
    return hold(arrays, device, (*matrices, resident(threshold, device, import_torch().float32)))


def place_predictor(a: Matrix, b: Matrix, bias: jax.Array, width: int, device) -> jax.Array:
    """A handle of the predictor of inputs (B, width) on the device."""
    return hold((*arrays_of(a), *arrays_of(b), bias), device, resident_predictor(a, b, bias, width, device))


def dense_ffn(x: jax.Array, ffn: jax.Array, *, activation: str, up_activation: str) -> jax.Array:
    """The dense FFN (B, D) of x (B, D), for a handle of `place_ffn`."""

    def host(x, handle):
        matrices = held(handle)
        return ops().dense_ffn(_moved(x, matrices[0]), *matrices, activation, up_activation).cpu().numpy()

    return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, jnp.float32), x, ffn, vmap_method="sequential")


def sparse_ffn(
    x: jax.Array,
    ffn: jax.Array,
    predictor: jax.Array,
    route: jax.Array,
    *,
    activation: str,
    up_activation: str,
    parallel: bool,
) -> tuple[jax.Array, jax.Array]:
    """The FFN (B, D) over the predicted neurons, and counts (B, 2), for the handles of both; route is (B, E)."""

    def host(x, ffn, predictor, route):
        matrices = held(ffn)
        x, route = (_moved(array, matrices[0]) for array in (x, route))
        operands = (x, *matrices, *held(predictor))
        y, counts = ops().sparse_ffn(*operands, activation, up_activation, parallel, route=route)
        return y.cpu().numpy(), counts.cpu().numpy()

    out = jax.ShapeDtypeStruct(x.shape, jnp.float32), jax.ShapeDtypeStruct((x.shape[0], 2), jnp.int32)
    return jax.pure_callback(host, out, x, ffn, predictor, route, vmap_method="sequential")


def _moved(x: Any, like):
    return import_torch().from_numpy(np.array(x, np.float32)).to(like.device)
