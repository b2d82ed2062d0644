"""Tile sizes of the kernels, by GPU, shape and dtype of the weights."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes are powers of two.

    Attributes:
      neurons: per program of `predict_gate_up`, which scores them and then reads the rows of those it predicts.
      rows: active neurons whose weights a program of `predict_gate_up` reads at once.
      columns: of a row read at once, at most.
      gate_warps: warps per program of `predict_gate_up`.
      groups: lists of survivors, one per block of `neurons`, that a program of `down` adds up.
      slots: survivors of each such list that are read at once.
      down_columns: of the output, per program of `down`.
      down_warps: warps per program of `down`.
    """

    neurons: int = 32
    rows: int = 4
    columns: int = 4096
    gate_warps: int = 8
    groups: int = 4
    slots: int = 4
    down_columns: int = 512
    down_warps: int = 4

    def __post_init__(self):
        if wrong := [f"{name} is {size}" for name, size in vars(self).items() if size < 1 or size.bit_count() != 1]:
            raise ValueError(f"tile sizes are powers of two, but {', '.join(wrong)}")
        if self.rows > self.neurons:
            raise ValueError(f"rows is {self.rows}, more than the {self.neurons} neurons of a program")


DEFAULTS: dict[str, Tiles] = {
    "sm_80": Tiles(),
    "sm_86": Tiles(rows=2),
    "sm_89": Tiles(rows=2),
    "sm_90": Tiles(rows=2),
}
"""By GPU generation, where TABLE has no row. sm_90 is measured, on an H100 with Llama-2-7B's shape. The others are
reckoned: 32 KB in flight per program where the memory is HBM, half of that where it is GDDR and fewer bytes are needed
to keep it busy."""

_PACKED = {"rows": 2, "slots": 2, "down_columns": 256}
"""Weights in 4 bits (`uint8`) have smaller tiles by default, because their codes and scales need registers: with the
tiles of other weights a thread needs more than 128."""

TABLE: dict[tuple[str, int, int, str], Tiles] = {}
"""By (GPU generation, neurons F, width D, dtype of the weights): rows that `python -m pallas_kernels.tune` printed."""


def generation() -> str:
    """The GPU's, as sm_90; that of the newest one with defaults where JAX computes on no CUDA device."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return f"sm_{capability.replace('.', '')}" if isinstance(capability, str) and "." in capability else "sm_90"


def choose(neurons: int, width: int, dtype: str, gpu: str | None = None) -> Tiles:
    """Tiles for a layer (F, D) whose weights have that dtype, on that GPU generation or the one JAX computes on."""
    gpu = gpu or generation()
    older = [name for name in DEFAULTS if int(name[3:]) <= int(gpu[3:])]
    newest = max(older, default="sm_80", key=lambda name: int(name[3:]))
    default = dataclasses.replace(DEFAULTS[newest], **(_PACKED if dtype == "uint8" else {}))
    return TABLE.get((gpu, neurons, width, dtype)) or default
