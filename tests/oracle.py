"""Independent float64 NumPy references: the FFN of the predicted neurons, and the threshold greedy step by step."""

import ml_dtypes
import numpy as np

from jsparse.arrays import Rows
from jsparse.model.cache import LayerCache
from jsparse.model.ffn import FFNSpec
from jsparse.model.weights import FFNWeights, Predictor


def matrix(stored) -> np.ndarray:
    """The exact value of a stored matrix: plain in any dtype, int8 rows, packed int4 rows, or rows of int4:32."""
    if not isinstance(stored, Rows):
        return np.asarray(stored).astype(np.float64)
    values = np.asarray(stored.values)
    if stored.storage.bits == 8:
        return values.astype(np.float64) * np.asarray(stored.scale, np.float64)
    width = (stored.columns + 1) // 2
    codes = np.empty((values.shape[0], 2 * width), np.int64)
    codes[:, 0::2] = values[:, :width] & 0x0F
    codes[:, 1::2] = values[:, :width] >> 4
    codes = codes[:, : stored.columns]
    if stored.storage.group is None:
        return (codes - 8) * np.asarray(stored.scale, np.float64)
    scale = np.ascontiguousarray(values[:, width:]).view("<f2").astype(np.float64)
    return np.asarray(stored.codebook, np.float64)[codes] * np.repeat(scale, 32, axis=1)[:, : stored.columns]


ACTIVATIONS = {
    "relu": lambda gate, threshold: np.where(gate > threshold, gate, 0),
    "relu2": lambda gate, threshold: np.where(gate > threshold, gate**2, 0),
    "silu": lambda gate, threshold: gate / (1 + np.exp(-gate)),
}


def ffn(
    x, weights: FFNWeights, predictor: Predictor | None, spec: FFNSpec, route=None
) -> tuple[np.ndarray, np.ndarray]:
    """y (B, D) and counts (B, 2) over the predicted neurons, or over all of them without a predictor.

    Route (B, E) scales the hidden values of E groups of neurons, and leaves out those where it is zero.
    """
    x = np.asarray(x, np.float64)
    hidden = ACTIVATIONS[spec.activation](x @ matrix(weights.gate).T, np.asarray(weights.threshold, np.float64))
    if spec.up is not None:
        up = x @ matrix(weights.up).T
        hidden = hidden * (np.maximum(up, 0) if spec.up == "relu" else up)
    predicted = np.ones(hidden.shape, bool)
    if predictor is not None:
        scores = x @ matrix(predictor.a).T @ matrix(predictor.b).T + np.asarray(predictor.bias, np.float64)
        predicted = scores > 0
    if route is not None:
        factors = np.repeat(np.asarray(route, np.float64), hidden.shape[1] // route.shape[1], axis=1)
        hidden, predicted = hidden * factors, predicted & (factors != 0)
    hidden = hidden * predicted
    return hidden @ matrix(weights.down_t), np.stack([predicted.sum(1), (hidden != 0).sum(1)], axis=1)


def quantize_heads(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values (..., H) as an int8 cache stores them, group by group of 32 channels."""
    codes, scale = np.zeros(x.shape, np.int8), np.zeros((*x.shape[:-1], -(-x.shape[-1] // 32)), ml_dtypes.bfloat16)
    for group in range(scale.shape[-1]):
        channels = slice(32 * group, 32 * group + 32)
        scale[..., group] = np.abs(x[..., channels]).max(-1) * np.float32(1 / 127)
        step = scale[..., group : group + 1].astype(np.float32)
        codes[..., channels] = np.round(x[..., channels] / np.where(step > 0, step, 1))
    return codes, scale


def restored(side, scale) -> np.ndarray:
    """Keys or values of a cache."""
    side = np.array(side, np.float64)
    if scale is None:
        return side
    return side * np.repeat(np.asarray(scale, np.float64), 32, axis=-1)[..., : side.shape[-1]]


def attend(q, k, v, start, count, cache: LayerCache, window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention token by token over ring-buffer caches, zeros for tokens that do not exist; then keys and values."""
    keys, values = (restored(*side) for side in ((cache.keys, cache.key_scale), (cache.values, cache.value_scale)))
    if cache.key_scale is not None:
        k, v = (restored(*quantize_heads(np.asarray(side))) for side in (k, v))
    q, k, v = (np.array(array, np.float64) for array in (q, k, v))
    batch, slots, _, head_dim = keys.shape
    out = np.zeros(q.shape)
    for b in range(batch):
        for t in range(int(count[b])):
            now = int(start[b]) + t
            keys[b, now % slots], values[b, now % slots] = k[b, t], v[b, t]
            oldest = max(0, now - min(slots, window or slots) + 1)
            seen = [p % slots for p in range(oldest, now + 1)]
            for head in range(q.shape[2]):
                kv = head // (q.shape[2] // k.shape[2])
                scores = keys[b, seen, kv] @ q[b, t, head] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[b, t, head] = weights / weights.sum() @ values[b, seen, kv]
    return out, keys, values


def calibrate_bias(
    scores, importance, target: float, levels: int = 256, silenced: str = "spare"
) -> tuple[np.ndarray, bool]:
    """The greedy of the method, one step at a time: bias (F,), and whether it ended short of the target."""
    num_neurons, num_tokens = scores.shape
    order = np.argsort(scores, axis=1, kind="stable")
    ascending = np.take_along_axis(np.asarray(scores, np.float64), order, axis=1)
    lost = np.cumsum(np.take_along_axis(np.asarray(importance, np.float64), order, axis=1), axis=1)
    skipped = [level * num_tokens // (levels - 1) for level in range(levels)]
    # A threshold at the k-th smallest score also skips the tokens that tie with it.
    tied = [
        [np.searchsorted(ascending[j], ascending[j, k - 1], side="right") if k else 0 for k in skipped]
        for j in range(num_neurons)
    ]
    cost = [[lost[j, t - 1] if t else 0.0 for t in tied[j]] for j in range(num_neurons)]
    level = [0] * num_neurons
    for j in range(num_neurons):
        while level[j] < int(0.95 * (levels - 1)) and cost[j][level[j] + 1] == 0:
            level[j] += 1
    early = False
    while sum(level) < target * num_neurons * (levels - 1) - 1e-6:
        num_silenced = sum(q == levels - 1 and cost[j][q] > 0 for j, q in enumerate(level))
        steps = [cost[j][q + 1] - cost[j][q] if q < levels - 1 else np.inf for j, q in enumerate(level)]
        if silenced == "spare" and num_silenced + 1 > 0.01 * num_neurons:
            steps = [
                np.inf if level[j] == levels - 2 and cost[j][levels - 1] > 0 else step for j, step in enumerate(steps)
            ]
        early = min(steps) == np.inf or (silenced == "stop" and num_silenced > 0.01 * num_neurons)
        if early:
            break
        level[int(np.argmin(steps))] += 1
    bias = [np.inf if skipped[q] == 0 else -ascending[j, skipped[q] - 1] for j, q in enumerate(level)]
    return np.array(bias), early
