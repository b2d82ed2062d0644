"""How the speed benchmarks measure and report: one process, interleaved rounds, medians, JSON on the last line."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import cpu_kernels

KEYS = ("engine", "shape", "mode", "dtype", "predicted", "active", "ms", "gbps", "share_of_limit")


class BandwidthProbe:
    """GB/s at which the device reads memory: a gigabyte, larger than any cache, in `passes` passes by `read`."""

    def __init__(self, read: Callable[[jax.Array], Any] = cpu_kernels.read, passes: int = 1):
        self._read, self._passes = read, passes
        self._data = jnp.ones((1 << 28,), jnp.float32)
        self._seconds: list[float] = []
        self.measure()

    def measure(self) -> None:
        """One reading; the fastest of all counts, since it is a limit."""
        self._seconds.append(seconds(lambda: self._read(self._data)))

    @property
    def gbps(self) -> float:
        return self._passes * self._data.nbytes / min(self._seconds[1:] or self._seconds) / 1e9


def seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


def interleave(
    engines: dict[Any, Callable[[], float]], rounds: int, probe: BandwidthProbe | None = None
) -> dict[Any, list[float]]:
    """Seconds of every engine in every round, the engines taking turns; a first turn that warms up is left out.

    Args:
      engines: by key, a function that runs once and returns its seconds.
      rounds: at least 1.
      probe: measured once in every round.
    """
    for run in engines.values():
        run()
    timings: dict[Any, list[float]] = {key: [] for key in engines}
    for _ in range(rounds):
        if probe is not None:
            probe.measure()
        for key, run in engines.items():
            timings[key].append(run())
    return timings


def row(
    engine: str,
    shape: str,
    mode: str,
    dtype: str,
    *,
    timings: Sequence[float],
    bytes_read: float,
    limit_gbps: float,
    predicted: float = 1.0,
    active: float = 1.0,
) -> dict:
    """A result: median ms, GB/s, and the share of the speed at which those bytes could be read at all."""
    median = statistics.median(timings)
    gbps = bytes_read / median / 1e9
    values = (engine, shape, mode, dtype, predicted, active, median * 1e3, gbps, gbps / limit_gbps)
    return dict(zip(KEYS, values))


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
