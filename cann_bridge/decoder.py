"""The whole decode step and its loop in torch on the device: nothing crosses to the host but the chosen tokens."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from cann_bridge.devices import import_torch
from cann_bridge.handover import Matrix, borrow, resident, resident_predictor
from cann_bridge.ops import ops, product

PAD = -1
"""Stands where a sequence had already ended."""
_GRAPH_SHARE = 1.5
"""Rows of a layer that a captured graph reads, in terms of the most that were predicted before."""
_capturing = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a decode step needs besides arrays.

    Attributes:
      num_heads, num_kv_heads, head_dim: of the attention.
      frequencies: (head_dim / 2,) radians per position of the rotary embedding.
      norm_eps: of every RMSNorm.
      embed_scale, residual_scale, logit_scale: factors of the embedding, of what a block adds, and of the last norm.
      window: positions a token sees, itself included; None for all.
      eos_ids: tokens that end a sequence.
      activation, up_activation, parallel: of the FFN, as in `cann_bridge.ops`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    frequencies: tuple[float, ...]
    norm_eps: float
    embed_scale: float
    residual_scale: float
    logit_scale: float
    window: int | None
    eos_ids: tuple[int, ...]
    activation: str
    up_activation: str
    parallel: bool


@dataclasses.dataclass(frozen=True)
class LayerArrays:
    """Arrays of one layer; matrices are (out, in), the FFN's (F, D).

    Attributes:
      biases: of q, k and v, or none.
      predictor: a, b and bias, or none for a dense FFN.
    """

    input_norm: jax.Array
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    post_attention_norm: jax.Array
    gate: Matrix
    up: Matrix | None
    down_t: Matrix
    threshold: jax.Array
    biases: tuple[jax.Array, ...] = ()
    predictor: tuple[Matrix, Matrix, jax.Array] | None = None


class Decoder:
    """A batch of sequences being decoded. Its state is tensors on the device, which every step writes in place."""

    def __init__(
        self, spec: Spec, embed: Matrix, layers: Sequence[LayerArrays], norm: jax.Array, head: Matrix, device: Any
    ):
        """Weights that are not yet on the device are handed over."""
        self._spec, self._device = spec, device
        self._torch = import_torch()
        self._embed, self._head = (resident(matrix, device, columns=norm.shape[0]) for matrix in (embed, head))
        self._norm = self._vector(norm)
        self._layers = [self._layer(layer) for layer in layers]
        self._frequencies = self._torch.tensor(spec.frequencies, dtype=self._torch.float32).to(device)
        self._eos = self._torch.tensor(spec.eos_ids, dtype=self._torch.int64).to(device)
        self._rows: list[int] | None = None
        self._graph, self._stepped = None, False
        self._graphs = getattr(getattr(self._torch, device.type, None), "NPUGraph", None)

    def _vector(self, array: jax.Array):
        return resident(array, self._device, self._torch.float32)

    def _layer(self, layer: LayerArrays) -> dict[str, Any]:
        width = layer.input_norm.shape[0]
        heads = {"q": width, "k": width, "v": width, "o": self._spec.num_heads * self._spec.head_dim}
        ffn = (layer.gate, layer.up, layer.down_t)
        return {name: resident(getattr(layer, name), self._device, columns=size) for name, size in heads.items()} | {
            "norms": [self._vector(array) for array in (layer.input_norm, layer.post_attention_norm)],
            "biases": [self._vector(array) for array in layer.biases],
            "ffn": [
                *(m if m is None else resident(m, self._device, columns=width) for m in ffn),
                self._vector(layer.threshold),
            ],
            "predictor": layer.predictor and resident_predictor(*layer.predictor, self._embed.shape[1], self._device),
        }

    def begin(
        self,
        caches: Sequence[tuple[jax.Array, jax.Array]],
        token: Any,
        position: Any,
        end: Any,
        finished: Any,
        chunk: int,
    ) -> None:
        """Take over from a prefill.

        Args:
          caches: keys and values (B, S, K, H) per layer; slot s holds the newest position p with p % S == s.
          token: (B,) the newest token, not yet fed; position: (B,) its position; end: (B,) the position at which a
            sequence ends; finished: (B,) sequences that have.
          chunk: most steps of `greedy`.
        """
        torch, device = self._torch, self._device
        self._caches = [[self._cache(side) for side in pair] for pair in caches]
        self._token, self._position, self._end = (
            torch.from_numpy(np.array(value, np.int64)).to(device) for value in (token, position, end)
        )
        self._finished = torch.from_numpy(np.array(finished, bool)).to(device)
        batch = self._token.shape[0]
        self._tokens = torch.full((batch, chunk), PAD, dtype=torch.int64).to(device)
        self._counts = torch.zeros((len(self._layers), 2), dtype=torch.int64).to(device)
        self._most = torch.zeros((len(self._layers),), dtype=torch.int64).to(device)
        self._finite = torch.ones((), dtype=torch.bool).to(device)
        for side in (side for pair in self._caches for side in pair if side.dtype == torch.float16):
            self._finite.logical_and_(_is_finite(side))
        self._index = torch.zeros((1,), dtype=torch.int64).to(device)
        self._nothing = torch.zeros((batch, 2), dtype=torch.int32).to(device)
        slots, rows = caches[0][0].shape[1], batch * self._spec.num_kv_heads
        self._slots = torch.arange(slots).to(device)
        self._offsets = (torch.arange(rows) * slots).to(device)

    def _cache(self, side: jax.Array):
        """Keys or values (B * K, S, H): a head's slots after one another, as its product takes them."""
        torch = self._torch
        # A CPU's own 16-bit products are less exact.
        dtype = torch.float32 if self._device.type == "cpu" or side.dtype == np.float32 else torch.float16
        batch, slots, heads, width = side.shape
        side = borrow(side).to(dtype).permute(0, 2, 1, 3).reshape(batch * heads, slots, width)
        return side.clone(memory_format=torch.contiguous_format).to(self._device)

    def finish(self, rows: np.ndarray) -> None:
        """Mark sequences (B,) as ended."""
        self._finished.logical_or_(self._torch.from_numpy(np.array(rows, bool)).to(self._device))

    @property
    def finished(self) -> np.ndarray:
        """(B,) sequences that have ended."""
        return self._finished.cpu().numpy().copy()

    def greedy(self, steps: int) -> tuple[np.ndarray, np.ndarray, list[int] | None]:
        """Decode up to `steps` tokens.

        Returns:
          the tokens (B, steps), PAD after a sequence's end; the neuron counts (L, 2) summed over them; and of how many
          neurons of each layer every token read all three rows, None if it read those of just the counted ones.

        Raises:
          ValueError: the logits are not finite.
        """
        with self._torch.no_grad():
            if not self.finished.all():
                self._capture()
            self._tokens.fill_(PAD)
            self._counts.zero_()
            self._index.zero_()
            restore = self._checkpoint(steps) if self._graph else None
            self._run(steps)
            if restore and not self._rows_suffice():  # exact again without it; the next chunk's graph reads more
                restore()
                self._graph = self._rows = None
                self._run(steps)
            self._check()
            tokens = self._tokens.cpu().numpy()[:, :steps].astype(np.int32)
            return tokens, self._counts.cpu().numpy(), self._rows

    def _run(self, steps: int) -> None:
        for done in range(steps):
            if done % 8 == 0 and self.finished.all():
                break
            self._graph.replay() if self._graph else self._greedy_step()

    def _checkpoint(self, steps: int) -> Callable[[], None]:
        """What takes the next `steps` steps back, the slots of the caches that they write included."""
        state = self._token, self._position, self._finished, self._finite
        numbers = [*state, self._tokens, self._counts, self._most, self._index]
        saved = [tensor.clone() for tensor in numbers]
        ahead = self._position[:, None] + self._torch.arange(steps).to(self._device)
        slots = (ahead % self._slots.shape[0]).repeat_interleave(self._spec.num_kv_heads, dim=0)
        places = (self._offsets[:, None] + slots).reshape(-1)
        flat = [side.view(-1, self._spec.head_dim) for pair in self._caches for side in pair]
        caches = [(side, places, side.index_select(0, places)) for side in flat]

        def restore():
            for tensor, value in zip(numbers, saved):
                tensor.copy_(value)
            for side, places, rows in caches:
                side.index_copy_(0, places, rows)

        return restore

    def _rows_suffice(self) -> bool:
        return bool((self._most.cpu().numpy() <= self._rows).all())

    def logits(self) -> np.ndarray:
        """Of the next token (B, V), for a caller that chooses it and calls `choose`."""
        with self._torch.no_grad():
            logits, self._step_counts = self._step()
            self._check()
            return logits.cpu().numpy()

    def choose(self, token: np.ndarray) -> np.ndarray:
        """Take the caller's tokens (B,) after `logits`; returns the counts (L, 2) of sequences that had not ended."""
        with self._torch.no_grad():
            self._counts.zero_()
            self._take(self._torch.from_numpy(np.array(token, np.int64)).to(self._device), self._step_counts)
            return self._counts.cpu().numpy().astype(np.int64)

    def _check(self) -> None:
        if not bool(self._finite):
            raise ValueError(
                f"the logits are not finite: the model's activations exceed what {self._device} computes in"
            )

    def _greedy_step(self) -> None:
        torch = self._torch
        self._stepped = True
        logits, counts = self._step()
        chosen = torch.argmax(logits, dim=1)
        self._tokens.index_copy_(1, self._index, torch.where(self._finished, PAD, chosen)[:, None])
        self._take(chosen, counts)

    def _take(self, chosen: Any, counts: Any) -> None:
        torch = self._torch
        counts = torch.where(self._finished[None, :, None], 0, counts.to(torch.int64))
        self._counts.add_(counts.sum(dim=1))
        self._most.copy_(torch.maximum(self._most, counts[:, :, 0].amax(dim=1)))
        self._token.copy_(chosen)
        self._position.add_(1)
        self._index.add_(1)
        ended = (chosen[:, None] == self._eos[None]).any(dim=1) | (self._position >= self._end)
        self._finished.logical_or_(ended)

    def _capture(self) -> None:
        """Record a step as an NPU graph, once steps have shown how many rows it should read.

        Without graphs on this device, steps go on one operation at a time.
        """
        if self._graphs is None or self._graph or not self._stepped:
            return
        self._index.zero_()
        restore = self._checkpoint(1)
        neurons = self._layers[0]["ffn"][0].shape[0]
        self._rows = [max(1, min(int(count * _GRAPH_SHARE), neurons)) for count in self._most.cpu().numpy()]
        graph = self._graphs()
        try:
            with _capturing:
                self._greedy_step()  # what is allocated or compiled at a first use is no part of the graph
                restore()
                with self._torch.npu.graph(graph, capture_error_mode="thread_local"):
                    self._greedy_step()
            self._graph = graph
        except RuntimeError as error:
            logging.getLogger("jsparse").warning("this device captures no graphs: %s", error)
            self._rows = self._graphs = None  # nor at another chunk
        restore()

    def _step(self) -> tuple[Any, Any]:
        """Logits (B, V) after the newest token, which the caches take, and the counts (L, B, 2)."""
        torch, spec = self._torch, self._spec
        x = spec.embed_scale * self._embed.index_select(0, self._token).to(torch.float32)
        angles = self._position[:, None].to(torch.float32) * self._frequencies[None]
        rotation = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
        counts = []
        for layer, cache, rows in zip(self._layers, self._caches, self._rows or [0] * len(self._layers)):
            x = x + spec.residual_scale * self._attention(self._normed(x, layer["norms"][0]), layer, cache, rotation)
            y, layer_counts = self._ffn(self._normed(x, layer["norms"][1]), layer, rows)
            x = x + spec.residual_scale * y
            counts.append(layer_counts)
        logits = product(spec.logit_scale * self._normed(x, self._norm), self._head)
        self._finite.logical_and_(_is_finite(logits))
        return logits, torch.stack(counts)

    def _normed(self, x: Any, scale: Any):
        return x * self._torch.rsqrt((x * x).mean(dim=1, keepdim=True) + self._spec.norm_eps) * scale

    def _ffn(self, x: Any, layer: dict[str, Any], rows: int) -> tuple[Any, Any]:
        torch, spec = self._torch, self._spec
        if layer["predictor"] is None:
            y = ops().dense_ffn(x, *layer["ffn"], spec.activation, spec.up_activation)
            return y, self._nothing
        route = (~self._finished).to(torch.float32)[:, None]  # what has ended reads no rows
        operands = (x, *layer["ffn"], *layer["predictor"], spec.activation, spec.up_activation, spec.parallel)
        return ops().sparse_ffn(*operands, rows, route)

    def _attention(self, x: Any, layer: dict[str, Any], cache: list[Any], rotation: tuple[Any, Any]):
        torch, spec = self._torch, self._spec
        batch, group = x.shape[0], spec.num_heads // spec.num_kv_heads
        parts = [product(x, layer[name]) for name in ("q", "k", "v")]
        if layer["biases"]:
            parts = [part + bias for part, bias in zip(parts, layer["biases"])]
        q, k, v = (part.reshape(batch, -1, spec.head_dim) for part in parts)
        q, k = _rotated(torch, q, *rotation), _rotated(torch, k, *rotation)
        keys, values = cache
        slots = keys.shape[1]
        # One row per sequence and key head from here on.
        position = self._position.repeat_interleave(spec.num_kv_heads)
        place = self._offsets + position % slots
        for side, new in ((keys, k), (values, v)):
            new = new.reshape(-1, spec.head_dim).to(side.dtype)
            if side.dtype == torch.float16:
                self._finite.logical_and_(_is_finite(new))
            side.view(-1, spec.head_dim).index_copy_(0, place, new)
        age = (position[:, None] - self._slots[None]) % slots
        visible = age <= position[:, None]
        if spec.window is not None:
            visible = visible & (age < spec.window)
        q = (q * spec.head_dim**-0.5).reshape(-1, group, spec.head_dim).to(keys.dtype)
        scores = torch.bmm(q, keys.transpose(1, 2)).to(torch.float32)
        scores = torch.where(visible[:, None], scores, torch.full_like(scores, float("-inf")))
        weights = torch.softmax(scores, dim=-1).to(values.dtype)
        out = torch.bmm(weights, values).to(torch.float32)
        return product(out.reshape(batch, -1), layer["o"])


def _is_finite(x: Any) -> Any:
    return (x.amax() < float("inf")) & (x.amin() > float("-inf"))


def _rotated(torch: Any, x: Any, cos: Any, sin: Any):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
