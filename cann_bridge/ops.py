"""The FFN as torch custom ops, `jsparse::dense_ffn` and `jsparse::sparse_ffn`, for CPU and NPU tensors.

Matrices are (F, D) floats of one dtype, in which products are taken; x, threshold (F,) and the results are float32.
`activation` is phi: relu, which keeps a gate above its neuron's threshold, relu2, its square, or silu, for the dense op
alone.
`up_activation` is psi: linear or relu. Without `up` the FFN is phi(gate x) alone.
"""

import functools
import threading

from cann_bridge.devices import import_torch

_ACTIVATIONS = {
    "relu": lambda gate, threshold: import_torch().where(gate > threshold, gate, import_torch().zeros_like(gate)),
    "relu2": lambda gate, threshold: _ACTIVATIONS["relu"](gate, threshold) ** 2,
    "silu": lambda gate, threshold: import_torch().nn.functional.silu(gate),
}
_UP_ACTIVATIONS = {"linear": lambda up: up, "relu": lambda up: up.relu()}
_WITHOUT_ZEROS = ("silu",)
_SCHEMAS = (
    "dense_ffn(Tensor x, Tensor gate, Tensor? up, Tensor down_t, Tensor threshold, str activation, "
    "str up_activation) -> Tensor",
    "sparse_ffn(Tensor x, Tensor gate, Tensor? up, Tensor down_t, Tensor threshold, Tensor a, Tensor b, Tensor bias, "
    "str activation, str up_activation, bool parallel=False, int rows=0, Tensor? route=None) -> (Tensor, Tensor)",
)
_lock = threading.Lock()
_defined: list = []
"""The library, once its ops are."""


def ops():
    """`torch.ops.jsparse`, its ops defined at the first call.

    dense_ffn(x (B, D), gate, up, down_t, threshold, activation, up_activation) -> y (B, D).

    sparse_ffn(x, gate, up, down_t, threshold, a (R, D), b (F, R), bias (F,), activation, up_activation, parallel, rows,
    route) -> y and counts (B, 2) int32: neurons with (b a x + bias) > 0, and those of them whose hidden value is not 0.
    With `rows` greater than 0 the shapes inside are fixed, as a captured graph needs: so many neurons of highest score
    are read, and of those predicted beyond them none. Route (B, E) scales the hidden values of E groups of F / E
    neurons each; where it is zero none of a group is predicted.
    """
    torch = import_torch()
    if not _defined:
        with _lock:
            if not _defined:
                _define(torch)
    return torch.ops.jsparse


def _define(torch) -> None:
    library = torch.library.Library("jsparse", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    for key in ("CPU", "PrivateUse1"):
        library.impl("dense_ffn", _dense, key)
        library.impl("sparse_ffn", _sparse, key)
    torch.library.register_fake("jsparse::dense_ffn", _dense_fake, lib=library)
    torch.library.register_fake("jsparse::sparse_ffn", _sparse_fake, lib=library)
    _defined.append(library)  # lives as long as the ops


def product(x, weight):
    """x W^T in float32, in the arithmetic of W."""
    torch = import_torch()
    return torch.mm(x.to(weight.dtype), weight.t()).to(torch.float32)


def down_product(hidden, down_t):
    """hidden (B, n) times down_t (n, D) in float32, in the arithmetic of down_t.

    float16 would not hold the product of two large activations: each row is divided by a power of two first.
    """
    torch = import_torch()
    if down_t.dtype != torch.float16 or not hidden.shape[1]:
        return torch.mm(hidden.to(down_t.dtype), down_t).to(torch.float32)
    largest = torch.maximum(hidden, -hidden).amax(dim=1, keepdim=True).clamp(min=1e-30)
    scale = torch.exp2(torch.floor(torch.log2(largest)))
    return torch.mm((hidden / scale).to(down_t.dtype), down_t).to(torch.float32) * scale


def _hidden(x, gate, up, threshold, phi, psi):
    """phi(gate x) * psi(up x), (B, n), of these rows."""
    hidden = phi(product(x, gate), threshold)
    return hidden if up is None else hidden * psi(product(x, up))


def _functions(activation: str, up_activation: str):
    """phi and psi. Raises: ValueError: there are none of that name."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(_ACTIVATIONS)}")
    if up_activation not in _UP_ACTIVATIONS:
        raise ValueError(f"up_activation is {up_activation!r}; it must be one of {', '.join(_UP_ACTIVATIONS)}")
    return _ACTIVATIONS[activation], _UP_ACTIVATIONS[up_activation]


def _dense(x, gate, up, down_t, threshold, activation, up_activation):
    hidden = _hidden(x, gate, up, threshold, *_functions(activation, up_activation))
    return down_product(hidden, down_t)


def _sparse(x, gate, up, down_t, threshold, a, b, bias, activation, up_activation, parallel=False, rows=0, route=None):
    if activation in _WITHOUT_ZEROS:
        raise ValueError(f"activation is {activation!r}, which has no zeros to skip")
    like_gate = [down_t] if up is None else [up, down_t]
    if x.shape[1] != gate.shape[1] or any(matrix.shape != gate.shape for matrix in like_gate):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, gate, *like_gate))
        raise ValueError(f"x, gate, up and down_t have shapes {shapes}, which do not fit one another")
    if route is not None and (route.shape[0] != x.shape[0] or gate.shape[0] % max(route.shape[1], 1)):
        raise ValueError(f"route has shape {tuple(route.shape)}, which is no group of neurons of {x.shape[0]} tokens")
    scores = product(product(x, a), b) + bias
    return over_predicted(
        x, scores, gate, up, down_t, threshold, activation, up_activation, parallel=parallel, rows=rows, route=route
    )


def over_predicted(
    x,
    scores,
    gate,
    up,
    down_t,
    threshold,
    activation="relu",
    up_activation="linear",
    *,
    parallel=False,
    rows=0,
    route=None,
):
    """What is left of the op when the scores (B, F) are known: y and counts."""
    torch = import_torch()
    route = scores.new_ones((x.shape[0], 1)) if route is None else route
    factors = route[:, :, None].expand(-1, -1, gate.shape[0] // route.shape[1]).reshape(scores.shape)
    scores = torch.where(factors != 0, scores, torch.full_like(scores, float("-inf")))
    functions = _functions(activation, up_activation)
    if rows:
        one = functools.partial(_fixed, rows=min(rows, gate.shape[0]))
    else:
        one = functools.partial(_exact, parallel=parallel)
    weights = (gate, up, down_t, threshold)
    done = [one(x[i : i + 1], scores[i], factors[i], *weights, *functions) for i in range(x.shape[0])]
    return torch.cat([y for y, _ in done]), torch.stack([counts for _, counts in done])


def _exact(x, scores, factors, gate, up, down_t, threshold, phi, psi, parallel):
    """One token over just its predicted neurons: their number decides the shapes."""
    torch = import_torch()
    predicted = torch.nonzero(scores > 0).squeeze(1)
    hidden = phi(product(x, gate.index_select(0, predicted)), threshold.index_select(0, predicted))
    hidden = hidden * factors.index_select(0, predicted)
    if parallel and up is not None:
        hidden = hidden * psi(product(x, up.index_select(0, predicted)))
    kept = torch.nonzero(hidden[0] != 0).squeeze(1)
    neurons, hidden = predicted.index_select(0, kept), hidden.index_select(1, kept)
    if not parallel and up is not None:
        hidden = hidden * psi(product(x, up.index_select(0, neurons)))
    y = down_product(hidden, down_t.index_select(0, neurons))
    active = torch.count_nonzero(hidden)
    total = torch.full_like(active, predicted.shape[0])
    return y, torch.stack([total, active]).to(torch.int32)


def _fixed(x, scores, factors, gate, up, down_t, threshold, phi, psi, rows):
    """One token over the `rows` neurons of highest score, those not predicted counting for nothing."""
    torch = import_torch()
    best, neurons = torch.topk(scores, rows)
    some = [None if matrix is None else matrix.index_select(0, neurons) for matrix in (gate, up, threshold)]
    hidden = _hidden(x, *some, phi, psi) * factors.index_select(0, neurons)
    hidden = torch.where(best[None] > 0, hidden, torch.zeros_like(hidden))
    y = down_product(hidden, down_t.index_select(0, neurons))
    return y, torch.stack([(scores > 0).sum(), torch.count_nonzero(hidden)]).to(torch.int32)


def _dense_fake(x, gate, up, down_t, threshold, activation, up_activation):
    return x.new_empty(x.shape, dtype=import_torch().float32)


def _sparse_fake(
    x, gate, up, down_t, threshold, a, b, bias, activation, up_activation, parallel=False, rows=0, route=None
):
    torch = import_torch()
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((x.shape[0], 2), dtype=torch.int32)
