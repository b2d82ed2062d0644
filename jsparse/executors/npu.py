"""The CANN executor: the FFN, or the whole decode step, on an Ascend NPU through torch_npu.

Inside jitted JAX the FFN alone is computed on the device, by callback, on weights that `place` put there; the rest of
the step is the host's executor's. `NpuLoop` is the fast way: the whole decode loop on the device.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import Matrix
from jsparse.errors import JsparseError
from jsparse.executors.kernels import activations, flat, operand, operands
from jsparse.model.cache import LayerCache
from jsparse.model.config import ModelConfig
from jsparse.model.executor import Executor, Split
from jsparse.model.ffn import FFNSpec
from jsparse.model.layers import rope_frequencies
from jsparse.model.slots import SlotState
from jsparse.model.weights import FFNWeights, Layer, Linear, Predictor, Weights
from jsparse.typing import Array, Float, Int


@partial(jax.tree_util.register_dataclass, data_fields=("handle",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Placed:
    """Weights or a predictor on the device, which a step takes by their handle () int32."""

    handle: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Npu(Executor):
    """An Ascend NPU beside the host that JAX computes on.

    Attributes:
      host: the executor of what stays on the host: the prompts' own pass, and by callback all but the FFN.
      device: PyTorch's name of the device: `npu`, or `cpu` for comparisons without one.
      whole: whether the device takes over the whole decode loop; else only FFNs are computed there, by callback.
      name: of the executor.
    """

    host: Executor
    device: str = "npu"
    whole: bool = True
    name: str = "cann"

    @property
    def _device(self):
        import cann_bridge

        return cann_bridge.device(self.device)

    def refuses(self, config: ModelConfig, kv_dtype: str | None = None) -> str | None:
        """As `Executor.refuses`: the device's own loop has one kind of attention, without a bias on its output."""
        if reason := super().refuses(config, kv_dtype):
            return reason
        if self.whole and kv_dtype == "int8":
            return "kv_dtype is int8, and the decode loop on the device keeps keys and values in floats"
        if self.whole and (config.slides is not None or config.rotates is not None):
            return "its layers differ in their attention, which the decode loop on the device does not follow"
        if self.whole and config.attention_bias == "all":
            return "its attention has a bias on its output, which the decode loop on the device does not follow"
        return None

    def place(self, weights: Weights, predictors: tuple[Predictor, ...] | None) -> tuple[Weights, Any]:
        """As `Executor.place`: FFNs and predictors on the device, unless the whole loop goes there later."""
        if self.whole:
            return weights, predictors
        layers = tuple(dataclasses.replace(layer, ffn=self.place_ffn(layer.ffn)) for layer in weights.layers)
        placed = predictors and tuple(map(self.place_predictor, predictors))
        return dataclasses.replace(weights, layers=layers), placed

    def place_ffn(self, ffn: FFNWeights) -> Placed:
        """An FFN on the device."""
        import cann_bridge

        with _as_user_error():
            return Placed(cann_bridge.place_ffn(*operands(ffn), self._device, ffn.gate.shape[1]))

    def place_predictor(self, predictor: Predictor) -> Placed:
        """A predictor on the device."""
        import cann_bridge

        factors = operand(predictor.a), operand(predictor.b), predictor.bias
        with _as_user_error():
            return Placed(cann_bridge.place_predictor(*factors, predictor.a.shape[1], self._device))

    def rows(self, matrix: Matrix, indices: Int[Array, "count"]) -> Float[Array, "count columns"]:
        """As `Executor.rows`, on the host."""
        return self.host.rows(matrix, indices)

    def norm(self, x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
        """As `Executor.norm`, on the host."""
        return self.host.norm(x, scale, eps)

    def project(
        self, x: Float[Array, "... D"], linears: Sequence[Linear], split: Split = "out"
    ) -> tuple[Float[Array, "... out"], ...]:
        """As `Executor.project`, on the host."""
        return self.host.project(x, linears, split)

    def dense_ffn(self, x: Float[Array, "... D"], ffn: FFNWeights | Placed, spec: FFNSpec) -> Float[Array, "... D"]:
        """As `Executor.dense_ffn`: on the device where the weights are placed there, else on the host (a prefill)."""
        import cann_bridge

        if not isinstance(ffn, Placed):
            return self.host.dense_ffn(x, ffn, spec)
        return cann_bridge.dense_ffn(flat(x), ffn.handle, **activations(spec)).reshape(x.shape)

    def sparse_ffn(
        self,
        x: Float[Array, "B D"],
        ffn: Placed,
        predictor: Placed,
        spec: FFNSpec,
        route: Float[Array, "B E"] | None = None,
    ) -> tuple[Float[Array, "B D"], Int[Array, "B 2"]]:
        """As `Executor.sparse_ffn`, on the device."""
        import cann_bridge

        return cann_bridge.sparse_ffn(
            x,
            ffn.handle,
            predictor.handle,
            jnp.ones((x.shape[0], 1)) if route is None else route,
            **activations(spec),
            parallel=spec.pipeline == "parallel",
        )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        count: Int[Array, "B"],
        cache: LayerCache,
        window: int | None,
    ) -> tuple[Float[Array, "B T N H"], LayerCache]:
        """As `Executor.attend`, on the host."""
        return self.host.attend(q, k, v, start, count, cache, window)

    def loop(
        self,
        config: ModelConfig,
        spec: FFNSpec,
        weights: Weights,
        predictors: tuple[Any, ...] | None,
        caches: tuple[LayerCache, ...],
        state: SlotState,
        choose: Callable | None,
        chunk: int,
    ) -> "NpuLoop | None":
        """As `Executor.loop`: the device's own, if it takes the whole."""
        if not self.whole:
            return None
        return NpuLoop(config, spec, weights, predictors, caches, state, choose, chunk, self._device)


class NpuLoop:
    """The decode loop on the device, taking over from a prefill on the host."""

    def __init__(
        self,
        config: ModelConfig,
        spec: FFNSpec,
        weights: Weights,
        predictors: tuple[Predictor, ...] | None,
        caches: tuple[LayerCache, ...],
        state: SlotState,
        choose: Callable | None,
        chunk: int,
        device: Any,
    ):
        """Hand the weights and the state over to `device`, a torch.device; the rest is as in `Executor.loop`."""
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
                device,
            )
        self._position = np.asarray(state.position)
        end = self._position + np.asarray(state.limit - state.produced)
        sides = [(cache.keys, cache.values) for cache in caches]
        self._decoder.begin(sides, state.token, self._position, end, ~np.asarray(state.active), chunk)
        self._choose, self._layers = choose, config.num_layers

    @property
    def active(self) -> np.ndarray:
        """(B,) sequences that have not ended."""
        return ~self._decoder.finished

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended."""
        self._decoder.finish(rows)

    def advance(self, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int] | None]:
        """As `DecodeLoop.advance`. Raises: JsparseError: the logits are not finite."""
        from cann_bridge import PAD

        with _as_user_error():
            tokens, counts, rows = self._decoder.greedy(steps) if self._choose is None else self._sampled(steps)
        return tokens, np.sum(tokens != PAD, axis=1), counts, rows

    def check(self, ended: np.ndarray | bool = False) -> None:
        """As `DecodeLoop.check`: `advance` has checked."""

    def _sampled(self, steps: int) -> tuple[np.ndarray, np.ndarray, None]:
        from cann_bridge import PAD

        active = self.active
        tokens = np.full((active.size, steps), PAD, np.int32)
        counts = []
        for i in range(steps):
            if not active.any():
                break
            self._position = self._position + 1
            chosen = np.asarray(self._choose(self._decoder.logits(), self._position))
            counts.append(self._decoder.choose(chosen))
            tokens[:, i] = np.where(active, chosen, PAD)
            active = self.active
        return tokens, np.sum(counts, axis=0) if counts else np.zeros((self._layers, 2), np.int64), None


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    """What the bridge refuses is the model's or the device's limit, which a user is told in a sentence."""
    try:
        yield
    except ValueError as error:
        raise JsparseError(f"executor 'cann': {error}") from error


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
        eos_ids=tuple(config.eos_token_ids),
        **activations(spec),
        parallel=spec.pipeline == "parallel",
    )


def _layer_arrays(layer: Layer, predictor: Predictor | None):
    import cann_bridge

    attention = layer.attention
    gate, up, down_t, threshold = operands(layer.ffn)
    return cann_bridge.LayerArrays(
        input_norm=layer.input_norm,
        **{name: operand(getattr(attention, name).rows) for name in ("q", "k", "v", "o")},
        post_attention_norm=layer.post_attention_norm,
        gate=gate,
        up=up,
        down_t=down_t,
        threshold=threshold,
        biases=tuple(linear.bias for linear in (attention.q, attention.k, attention.v) if linear.bias is not None),
        predictor=predictor and (operand(predictor.a), operand(predictor.b), predictor.bias),
    )
