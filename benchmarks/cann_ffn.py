"""One FFN layer's decode step on an Ascend NPU: `python -m benchmarks.cann_ffn [--shape ...] [--device cpu]`.

Dense against sparse at 80 to 95% sparsity, with the predictor and with its scores given, through the bridge's ops.
Where there is no NPU it runs on PyTorch's CPU and says so; those times say nothing about an NPU.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable

import numpy as np

import cann_bridge
from benchmarks.report import BandwidthProbe, Engine, compare, positive, print_json, seconds
from benchmarks.shapes import SHAPES
from cann_bridge.devices import import_torch, predictor_dtype
from cann_bridge.ops import ops, over_predicted, product

SPARSITIES = (0.8, 0.85, 0.9, 0.95)
ROTATED = 2
"""Layers that are run in turn: each is more than any cache holds."""
REPEATS = {"npu": 50, "cpu": 1}


class Bench:
    """Random weights of one shape on the device: a gate value is positive for every predicted neuron."""

    def __init__(self, device: str, neurons: int, width: int, rank: int):
        torch = import_torch()
        self._torch, self._device = torch, torch.device(device)
        self._npu = device != "cpu"
        dtype = torch.float16 if self._npu else torch.bfloat16
        self._layers = [
            [(torch.randn(neurons, width) * width**-0.5).to(dtype).to(device) for _ in range(3)] for _ in range(ROTATED)
        ]
        self._threshold = torch.full((neurons,), -1e9).to(device)  # every gate value is above it
        factors = torch.randn(rank, width) * width**-0.5, torch.randn(neurons, rank) * rank**-0.5
        self._factors = [m.to(predictor_dtype(self._device)).to(device) for m in factors]
        self._x = torch.randn(1, width).to(device)
        self._scores = product(product(self._x, self._factors[0]), self._factors[1])
        self.dtype = "float16" if self._npu else "bfloat16"
        self.weight_bytes = sum(m.nbytes for m in self._layers[0])
        self.predictor_bytes = sum(m.nbytes for m in self._factors)

    def dense(self) -> float:
        return self._seconds(lambda layer: ops().dense_ffn(self._x, *layer, self._threshold, "relu", "linear"))

    def npu_ffn(self) -> Callable[[], float] | None:
        """torch_npu's fused dense FFN, ReGLU; None where it is not there or refuses."""
        if not self._npu:
            return None
        torch, torch_npu = self._torch, __import__("torch_npu")
        fused = [(torch.cat([gate, up]).t().contiguous(), down_t) for gate, up, down_t in self._layers]
        x = self._x.to(torch.float16)

        def run() -> float:
            weights = iter(fused * (REPEATS["npu"] + 1))
            return self._seconds(lambda _: torch_npu.npu_ffn(x, *next(weights), "reglu"))

        try:
            run()
        except (AttributeError, RuntimeError) as error:
            print(f"torch_npu.npu_ffn is left out: {error}")
            return None
        return run

    def sparse(self, sparsity: float, predictor: bool) -> Callable[[], float]:
        """A run at which that share of the neurons is not predicted, and all others are active."""
        torch = self._torch
        bias = torch.full_like(self._scores[0], -float(np.quantile(self._scores.cpu().numpy(), sparsity)))

        def with_predictor(layer):
            return ops().sparse_ffn(self._x, *layer, self._threshold, *self._factors, bias, "relu", "linear")

        def without(layer):
            return over_predicted(self._x, self._scores + bias, *layer, self._threshold)

        return lambda: self._seconds(with_predictor if predictor else without)

    def probe(self) -> BandwidthProbe:
        data = self._torch.ones(1 << 28, dtype=self._torch.float32).to(self._device)
        return BandwidthProbe(lambda: self._seconds(lambda _: data.sum()), data.nbytes)

    def engines(self) -> list[Engine]:
        engines = [Engine("bridge", "dense", self.dtype, self.dense, self.weight_bytes)]
        if fused := self.npu_ffn():
            engines.append(Engine("torch_npu.npu_ffn", "dense", self.dtype, fused, self.weight_bytes))
        for sparsity in SPARSITIES:
            share = 1 - sparsity
            read = self.weight_bytes * share
            run = self.sparse(sparsity, predictor=True)
            engines.append(Engine("bridge", "sparse", self.dtype, run, read + self.predictor_bytes, share, share))
            run = self.sparse(sparsity, predictor=False)
            engines.append(Engine("bridge, scores given", "sparse", self.dtype, run, read, share, share))
        return engines

    def _seconds(self, step: Callable) -> float:
        """Of a layer."""
        repeats = REPEATS["npu" if self._npu else "cpu"]

        def run():
            with self._torch.no_grad():
                for _ in range(repeats):
                    for layer in self._layers:
                        step(layer)
            if self._npu:
                self._torch.npu.synchronize()

        return seconds(run) / repeats / len(self._layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = [name for name in SHAPES if name.endswith("7B")]
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=shapes)
    parser.add_argument("--device", choices=("npu", "cpu"), help="an NPU where there is one, else PyTorch's CPU")
    parser.add_argument("--rounds", type=positive, default=9)
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print("error: this needs PyTorch: pip install -e '.[bench]'", file=sys.stderr)
        raise SystemExit(2)
    reason = cann_bridge.unavailable()
    if args.device == "npu" and reason:
        print(f"error: there is no NPU to measure: {reason}", file=sys.stderr)
        raise SystemExit(2)
    device = args.device or ("cpu" if reason else "npu")
    if device == "cpu":
        print("On PyTorch's CPU: the times below say nothing about an NPU.")
    results = []
    for shape in args.shape:
        config = SHAPES[shape]
        bench = Bench(device, config.intermediate_size, config.hidden_size, config.hidden_size // 4)
        title = f"one FFN layer on {device}, one token"
        results += compare(title, shape, bench.engines(), args.rounds, bench.probe())[0]
        print_json(results)


if __name__ == "__main__":
    main()
