"""The hand-written CUDA C kernels of `sparse_ffn.cu` on JAX's arrays, through CuPy, for `benchmarks.cuda_ffn`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import Rows
from jsparse.model.weights import FFNWeights, Predictor

NEURONS, GROUPS, THREADS, COLUMNS = 32, 4, 256, 8
"""As in the source."""


class CudaC:
    """The sparse FFN of rotated layers on one token, captured in a CUDA graph; `run` returns the seconds of a layer."""

    def __init__(self, x: jax.Array, layers: list[tuple[FFNWeights, Predictor]], threshold: float, repeats: int):
        import cupy

        self._cupy = cupy
        source = Path(__file__).with_name("sparse_ffn.cu").read_text()
        module = cupy.RawModule(code=source, options=("--std=c++17",))
        self._kernels = {
            name: module.get_function(name)
            for name in (
                *(f"{kernel}_{bits}" for kernel in ("predict_gate_up", "features") for bits in ("float16", "int4")),
                "down",
                "add_up",
            )
        }
        self._threshold, self._repeats = np.float32(threshold), repeats
        num_neurons, width = layers[0][0].gate.shape
        blocks = -(-num_neurons // NEURONS)
        self._sizes = num_neurons, width, layers[0][1].rank, blocks, -(-blocks // GROUPS)
        flat = x.astype(jnp.float32).reshape(-1)
        jax.block_until_ready((flat, layers))  # CuPy's stream does not wait for JAX's
        self._x = cupy.from_dlpack(flat)
        self._scratch = {
            "z": cupy.empty(self._sizes[2], "float32"),
            "survivors": cupy.empty(blocks * NEURONS, "int32"),
            "hidden": cupy.empty(blocks * NEURONS, "float32"),
            "counts": cupy.empty(blocks, "int32"),
            "partial": cupy.empty((self._sizes[4], width), "float32"),
            "y": cupy.empty(width, "float32"),
        }
        self._held = [jax.tree.map(cupy.from_dlpack, layer) for layer in layers]
        self._stream = cupy.cuda.Stream(non_blocking=True)
        with self._stream:
            self._step(*self._held[0])
            self._stream.synchronize()
            self._stream.begin_capture()
            for layer in self._held:
                self._step(*layer)
            self._graph = self._stream.end_capture()

    @property
    def result(self) -> np.ndarray:
        """y of the layer that ran last."""
        return self._scratch["y"].get()

    def _step(self, ffn: FFNWeights, predictor: Predictor) -> None:
        """One layer: four launches."""
        s = self._scratch
        num_neurons, width, rank, blocks, programs = (np.int32(size) for size in self._sizes)
        is_int4 = isinstance(predictor.a, Rows)
        bits = "int4" if is_int4 else "float16"
        a, b = ((m.values, m.scale) if is_int4 else (m,) for m in (predictor.a, predictor.b))
        warps = THREADS // 32
        self._launch(f"features_{bits}", (-(-rank // warps),), THREADS, (self._x, *a, s["z"], rank, width))
        self._launch(
            f"predict_gate_up_{bits}",
            (blocks,),
            THREADS,
            (
                *(self._x, s["z"], *b, predictor.bias, ffn.gate, ffn.up, self._threshold),
                *(s["survivors"], s["hidden"], s["counts"], num_neurons, width, rank),
            ),
            shared=4 * int(width),
        )
        grid = (programs, -(-width // (128 * COLUMNS)))
        lists = s["survivors"], s["hidden"], s["counts"]
        self._launch("down", grid, 128, (*lists, ffn.down_t, s["partial"], blocks, width))
        self._launch("add_up", (-(-width // THREADS),), THREADS, (s["partial"], s["y"], programs, width))

    def _launch(self, name: str, grid: tuple, threads: int, arguments: tuple, shared: int = 0) -> None:
        self._kernels[name](tuple(map(int, grid)), (threads,), arguments, shared_mem=shared)

    def run(self) -> float:
        """Device time by events."""
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record(self._stream)
        for _ in range(self._repeats):
            self._graph.launch(self._stream)
        end.record(self._stream)
        end.synchronize()
        milliseconds = self._cupy.cuda.get_elapsed_time(begin, end)
        return milliseconds / 1e3 / self._repeats / len(self._held)
