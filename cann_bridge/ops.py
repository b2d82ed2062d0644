"""The FFN as torch custom ops, `jsparse::dense_reglu_ffn` and `jsparse::sparse_reglu_ffn`, for CPU and NPU tensors.

Matrices are (F, D) floats of one dtype, in which products are taken; x and the results are float32. `kind` is reglu,
drelu or fatrelu (phi keeps a gate above `threshold`, psi is relu for drelu), for the dense op also swiglu.
"""

import functools
import threading

from cann_bridge.devices import import_torch

_KINDS = ("reglu", "drelu", "fatrelu")
_SCHEMAS = (
    "dense_reglu_ffn(Tensor x, Tensor gate, Tensor up, Tensor down_t, str kind, float threshold=0.0) -> Tensor",
    "sparse_reglu_ffn(Tensor x, Tensor gate, Tensor up, Tensor down_t, Tensor a, Tensor b, Tensor bias, str kind, "
    "float threshold=0.0, bool parallel=False, int rows=0) -> (Tensor, Tensor)",
)
_lock = threading.Lock()
_defined: list = []
"""The library, once its ops are."""


def ops():
    """`torch.ops.jsparse`, its ops defined at the first call.

    dense_reglu_ffn(x (B, D), gate, up, down_t, kind, threshold) -> y (B, D).

    sparse_reglu_ffn(x, gate, up, down_t, a (R, D), b (F, R), bias (F,), kind, threshold, parallel, rows) -> y and
    counts (B, 2) int32: neurons with (b a x + bias) > 0, and those of them with phi(gate) * psi(up) != 0. With `rows`
    greater than 0 the shapes inside are fixed, as a captured graph needs: so many neurons of highest score are read,
    and of those predicted beyond them none.
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
        library.impl("dense_reglu_ffn", _dense, key)
        library.impl("sparse_reglu_ffn", _sparse, key)
    torch.library.register_fake("jsparse::dense_reglu_ffn", _dense_fake, lib=library)
    torch.library.register_fake("jsparse::sparse_reglu_ffn", _sparse_fake, lib=library)
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


def _phi(gate, kind: str, threshold: float):
    torch = import_torch()
    if kind == "swiglu":
        return torch.nn.functional.silu(gate)
    return torch.where(gate > threshold, gate, torch.zeros_like(gate))


def _psi(up, kind: str):
    return up.relu() if kind == "drelu" else up


def _dense(x, gate, up, down_t, kind, threshold=0.0):
    if kind not in (*_KINDS, "swiglu"):
        raise ValueError(f"kind is {kind!r}; it must be {', '.join(_KINDS)} or swiglu")
    hidden = _phi(product(x, gate), kind, threshold) * _psi(product(x, up), kind)
    return down_product(hidden, down_t)


def _sparse(x, gate, up, down_t, a, b, bias, kind, threshold=0.0, parallel=False, rows=0):
    if kind not in _KINDS:
        raise ValueError(f"kind is {kind!r}; a sparse FFN is {', '.join(_KINDS)}")
    if x.shape[1] != gate.shape[1] or gate.shape != up.shape or gate.shape != down_t.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, gate, up, down_t))
        raise ValueError(f"x, gate, up and down_t have shapes {shapes}, which do not fit one another")
    scores = product(product(x, a), b) + bias
    return over_predicted(x, scores, gate, up, down_t, kind, threshold, parallel, rows)


def over_predicted(x, scores, gate, up, down_t, kind, threshold=0.0, parallel=False, rows=0):
    """What is left of the op when the scores (B, F) are known: y and counts."""
    torch = import_torch()
    if rows:
        one = functools.partial(_fixed, rows=min(rows, gate.shape[0]))
    else:
        one = functools.partial(_exact, parallel=parallel)
    done = [one(x[i : i + 1], scores[i], gate, up, down_t, kind, threshold) for i in range(x.shape[0])]
    return torch.cat([y for y, _ in done]), torch.stack([counts for _, counts in done])


def _exact(x, scores, gate, up, down_t, kind, threshold, parallel):
    """One token over just its predicted neurons: their number decides the shapes."""
    torch = import_torch()
    predicted = torch.nonzero(scores > 0).squeeze(1)
    hidden = _phi(product(x, gate.index_select(0, predicted)), kind, threshold)
    if parallel:
        hidden = hidden * _psi(product(x, up.index_select(0, predicted)), kind)
    kept = torch.nonzero(hidden[0] != 0).squeeze(1)
    neurons, hidden = predicted.index_select(0, kept), hidden.index_select(1, kept)
    if not parallel:
        hidden = hidden * _psi(product(x, up.index_select(0, neurons)), kind)
    y = down_product(hidden, down_t.index_select(0, neurons))
    active = torch.count_nonzero(hidden)
    total = torch.full_like(active, predicted.shape[0])
    return y, torch.stack([total, active]).to(torch.int32)


def _fixed(x, scores, gate, up, down_t, kind, threshold, rows):
    """One token over the `rows` neurons of highest score, those not predicted counting for nothing."""
    torch = import_torch()
    best, neurons = torch.topk(scores, rows)
    hidden = _phi(product(x, gate.index_select(0, neurons)), kind, threshold)
    hidden = hidden * _psi(product(x, up.index_select(0, neurons)), kind)
    hidden = torch.where(best[None] > 0, hidden, torch.zeros_like(hidden))
    y = down_product(hidden, down_t.index_select(0, neurons))
    return y, torch.stack([(scores > 0).sum(), torch.count_nonzero(hidden)]).to(torch.int32)


def _dense_fake(x, gate, up, down_t, kind, threshold=0.0):
    return x.new_empty(x.shape, dtype=import_torch().float32)


def _sparse_fake(x, gate, up, down_t, a, b, bias, kind, threshold=0.0, parallel=False, rows=0):
    torch = import_torch()
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((x.shape[0], 2), dtype=torch.int32)
