"""How the speed benchmarks measure and report: one process, interleaved rounds, medians, JSON on the last line."""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import cpu_kernels
from jsparse.arrays import aligned_empty

RESAMPLES = 10_000
KEYS = ("engine", "shape", "mode", "dtype", "predicted", "active", "ms", "gbps", "share_of_limit")


@dataclasses.dataclass(frozen=True)
class Engine:
    """Something that is measured: `run` returns the seconds of a layer or token, which takes `read` bytes."""

    name: str
    mode: str
    dtype: str
    run: Callable[[], float]
    read: float
    predicted: float = 1.0
    active: float = 1.0


class BandwidthProbe:
    """GB/s at which a device reads memory: `run` reads so many bytes, too many for a cache, and returns the seconds."""

    def __init__(self, run: Callable[[], float], num_bytes: int):
        self._run, self._num_bytes = run, num_bytes
        self._run()  # compiles

    def measure(self) -> float:
        """One reading."""
        return self._num_bytes / self._run() / 1e9


def cpu_probe() -> BandwidthProbe:
    """A probe that reads large pages, since weights lie in them: Linux gives them to NumPy's arrays, not to XLA's."""
    data = aligned_empty((1 << 28,), np.dtype(np.float32))
    data[...] = 1
    data = jax.device_put(data)
    return BandwidthProbe(lambda: seconds(lambda: cpu_kernels.read(data)), data.nbytes)


def seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


def interleave(engines: Sequence[Engine], rounds: int, probe: BandwidthProbe) -> tuple[list[list[float]], list[float]]:
    """Seconds of every engine in every round, and the probe's readings: all take turns, after a turn that warms up."""
    for engine in engines:
        engine.run()
    timings: list[list[float]] = [[] for _ in engines]
    readings = []
    for _ in range(rounds):
        readings.append(probe.measure())
        for engine, taken in zip(engines, timings):
            taken.append(engine.run())
    return timings, readings


def compare(
    title: str, shape: str, engines: Sequence[Engine], rounds: int, probe: BandwidthProbe
) -> tuple[list[dict], list[list[float]]]:
    """Time the engines in turns and print the table; returns its rows and every engine's seconds by round."""
    timings, readings = interleave(engines, rounds, probe)
    limit = statistics.median(readings)
    rows = [row(shape, engine, taken, limit) for engine, taken in zip(engines, timings)]
    print_rows(f"{shape}: {title}; memory reads at {limit:.1f} GB/s", rows)
    return rows, timings


def row(shape: str, engine: Engine, timings: Sequence[float], limit_gbps: float) -> dict:
    """A result: median ms, GB/s, and the share of the speed at which those bytes could be read at all."""
    median = statistics.median(timings)
    gbps = engine.read / median / 1e9
    names = engine.name, shape, engine.mode, engine.dtype
    return dict(zip(KEYS, (*names, engine.predicted, engine.active, median * 1e3, gbps, gbps / limit_gbps)))


def interval(values: Sequence[float], statistic: Callable = np.mean) -> tuple[float, float]:
    """The 95% interval of a statistic (NumPy's `mean` or `median`) of measurements, by resampling them."""
    chosen = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(statistic(np.asarray(values)[chosen], axis=1), (0.025, 0.975))
    return float(low), float(high)


def processor() -> str:
    """What /proc/cpuinfo calls it: its name says little in a virtual machine, family and model do."""
    path = Path("/proc/cpuinfo")
    entries = dict(line.partition(":")[::2] for line in path.read_text().splitlines()) if path.exists() else {}
    found = {key.strip(): value.strip() for key, value in entries.items()}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']}, family {found.get('cpu family', '?')} model {found.get('model', '?')}"


def print_rows(title: str, rows: Sequence[dict]) -> None:
    """The table of results."""
    table = Table(title=title)
    for key in KEYS:
        table.add_column(key.replace("_", " "), justify="left" if key in KEYS[:4] else "right")
    for r in rows:
        numbers = (f"{r['predicted']:.0%}", f"{r['active']:.0%}", f"{r['ms']:.2f}", f"{r['gbps']:.1f}")
        table.add_row(*(r[key] for key in KEYS[:4]), *numbers, f"{r['share_of_limit']:.0%}")
    Console(width=130).print(table)


def print_json(rows: Sequence[dict]) -> None:
    print(json.dumps(list(rows)), flush=True)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
