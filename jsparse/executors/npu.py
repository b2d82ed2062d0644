"""The CANN executor: the FFN, or the whole decode step, on an Ascend NPU through torch_npu.

Inside jitted JAX the FFN alone is computed on the device, by callback, on weights that `place` put there; the rest of
the step is the host's executor's. `DeviceLoop` is the fast way: the whole decode loop on the device.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jsparse.arrays import Matrix
from jsparse.errors import JsparseError
from jsparse.executors import cpu, xla
from jsparse.executors.operands import flat, operand, operands
from jsparse.model.attention import KVCache
from jsparse.model.config import ModelConfig
from jsparse.model.ffn import FFNSpec
from jsparse.model.layers import rope_frequencies
from jsparse.model.weights import FFNWeights, Layer, Predictor, Weights
from jsparse.typing import Array, Float, Int


def unavailable() -> str | None:
    """Why this executor cannot run here, or None."""
    import cann_bridge

    if jax.default_backend() != "cpu":
        return f"arrays cross to the NPU from a CPU, and JAX computes on {jax.default_backend()}; set JAX_PLATFORMS=cpu"
    return cann_bridge.unavailable()


def decodes_on_device() -> bool:
    """Whether generation takes `DeviceLoop`: on an NPU. On PyTorch's CPU, which is for comparisons, it does not."""
    import cann_bridge

    return cann_bridge.device().type != "cpu"


@partial(jax.tree_util.register_dataclass, data_fields=("handle",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Placed:
    """Weights or a predictor on the device, which a step takes by their handle () int32."""

    handle: Int[Array, ""]


def place(weights: Weights, predictors: tuple[Predictor, ...] | None) -> tuple[Weights, Any]:
    """The weights and predictors of a model with the FFNs' ones on the device."""
    layers = tuple(dataclasses.replace(layer, ffn=place_ffn(layer.ffn)) for layer in weights.layers)
    return dataclasses.replace(weights, layers=layers), predictors and tuple(map(place_predictor, predictors))


def place_ffn(ffn: FFNWeights) -> Placed:
    """An FFN on the device."""
    import cann_bridge

    with _as_user_error():
        return Placed(cann_bridge.place_ffn(*operands(ffn), cann_bridge.device()))


def place_predictor(predictor: Predictor) -> Placed:
    """A predictor on the device."""
    import cann_bridge

    factors = operand(predictor.a), operand(predictor.b), predictor.bias
    with _as_user_error():
        return Placed(cann_bridge.place_predictor(*factors, predictor.a.shape[1], cann_bridge.device()))


def take_rows(matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
    """Rows of the matrix in float32, on the host."""
    return _host().take_rows(matrix, indices)


def linear(x: Float[Array, "... D"], weight: Matrix) -> Float[Array, "... out"]:
    """x W^T, W (out, D), on the host."""
    return _host().linear(x, weight)


def linears(x: Float[Array, "... D"], weights: Sequence[Matrix]) -> tuple[Float[Array, "... out"], ...]:
    """x W^T for every W, on the host."""
    return _host().linears(x, weights)


def dense_ffn(x: Float[Array, "... D"], ffn: FFNWeights | Placed, spec: FFNSpec) -> Float[Array, "... D"]:
    """The FFN over all neurons: on the device where its weights are placed there, else on the host (a prefill)."""
    import cann_bridge

    if not isinstance(ffn, Placed):
        return _host().dense_ffn(x, ffn, spec)
    return cann_bridge.dense_ffn(flat(x), ffn.handle, kind=spec.kind, threshold=spec.threshold).reshape(x.shape)


def sparse_ffn(
    x: Float[Array, "B D"], ffn: Placed, predictor: Placed, spec: FFNSpec
) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
    """The FFN restricted to the predicted neurons, on the device, reading the rows of no others."""
    import cann_bridge

    return cann_bridge.sparse_ffn(
        x,
        ffn.handle,
        predictor.handle,
        kind=spec.kind,
        threshold=spec.threshold,
        parallel=spec.pipeline == "parallel",
    )


def attend(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    position: Int[Array, "B"],
    cache: KVCache,
    window: int | None,
) -> tuple[Float[Array, "B N H"], KVCache]:
    """One token per sequence over its cache, on the host; as `attention.attend`."""
    return _host().attend(q, k, v, position, cache, window)


class DeviceLoop:
    """The decode loop on the device, taking over from a prefill on the host."""

    def __init__(
        self,
        config: ModelConfig,
        spec: FFNSpec,
        weights: Weights,
        predictors: tuple[Predictor, ...] | None,
        state: Any,
        choose: Callable | None,
        chunk: int,
    ):
        """state: a `loop.DecodeState`. choose: from logits and keys to tokens and keys; None for greedy."""
        import cann_bridge

        layers = [_layer_arrays(layer, predictors[i] if predictors else None) for i, layer in enumerate(weights.layers)]
        head = weights.embed if weights.head is None else weights.head
        with _as_user_error():
            self._decoder = cann_bridge.Decoder(
                _spec(config, spec),
                operand(weights.embed),
                layers,
                weights.norm,
                operand(head),
                cann_bridge.device(),
            )
        self._decoder.begin(state.caches, state.token, state.position, state.finished, chunk)
        self._choose, self._keys, self._layers = choose, state.keys, config.num_layers

    @property
    def finished(self) -> np.ndarray:
        """(B,) sequences that have ended."""
        return self._decoder.finished

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended."""
        self._decoder.finish(rows)

    def advance(self, steps: int) -> tuple[np.ndarray, np.ndarray, list[int] | None]:
        """Tokens (B, steps), PAD after a sequence's end, and counts (L, 2), as `loop.decode_chunk`.

        Third, the neurons of each layer whose rows a captured graph read for every token; None where only rows that
        the counts account for were read.
        """
        with _as_user_error():
            return self._decoder.greedy(steps) if self._choose is None else self._sampled(steps)

    def _sampled(self, steps: int) -> tuple[np.ndarray, np.ndarray, None]:
        from cann_bridge import PAD

        ended = self.finished
        tokens = np.full((ended.size, steps), PAD, np.int32)
        counts = []
        for i in range(steps):
            if ended.all():
                break
            logits = self._decoder.logits()
            chosen, self._keys = self._choose(logits, self._keys)
            counts.append(self._decoder.choose(np.asarray(chosen)))
            tokens[:, i] = np.where(ended, PAD, np.asarray(chosen))
            ended = self.finished
        return tokens, np.sum(counts, axis=0) if counts else np.zeros((self._layers, 2), np.int64), None


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    """What the bridge refuses is the model's or the device's limit, which a user is told in a sentence."""
    try:
        yield
    except ValueError as error:
        raise JsparseError(f"executor 'cann': {error}") from error


def _host() -> ModuleType:
    return xla if cpu.unavailable() else cpu


def _spec(config: ModelConfig, spec: FFNSpec):
    import cann_bridge

    return cann_bridge.Spec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        frequencies=tuple(rope_frequencies(config).tolist()),
        norm_eps=config.norm_eps,
        embed_scale=config.embed_scale,
        residual_scale=config.residual_scale,
        logit_scale=config.logit_scale,
        window=config.sliding_window,
        context_length=config.context_length,
        eos_ids=tuple(config.eos_token_ids),
        kind=spec.kind,
        threshold=spec.threshold,
        parallel=spec.pipeline == "parallel",
    )


def _layer_arrays(layer: Layer, predictor: Predictor | None):
    import cann_bridge

    attention = layer.attention
    gate, up, down_t = operands(layer.ffn)
    return cann_bridge.LayerArrays(
        input_norm=layer.input_norm,
        **{name: operand(getattr(attention, name).rows) for name in ("q", "k", "v", "o")},
        post_attention_norm=layer.post_attention_norm,
        gate=gate,
        up=up,
        down_t=down_t,
        biases=tuple(linear.bias for linear in (attention.q, attention.k, attention.v) if linear.bias is not None),
        predictor=predictor and (operand(predictor.a), operand(predictor.b), predictor.bias),
    )
