"""An unfinished calibration on disk, so that an interruption costs one layer at most."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.arrays import restore_rows
from jsparse.checkpoints.first_format import leaves_in_order
from jsparse.checkpoints.native import digest
from jsparse.errors import JsparseError
from jsparse.model.weights import Params, Predictor
from jsparse.predictors.options import CalibrationOptions, LayerReport


class CalibrationState:
    """Finished layers on disk: `layer_N.npz` and the hidden states after the last of them."""

    def __init__(self, directory: str | Path, params: Params, rows: np.ndarray, options: CalibrationOptions):
        self._directory = Path(directory)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JsparseError(f"{self._directory}: cannot be written: {error.strerror or error}") from error
        self._config, self._options = params.config, options
        chosen = dataclasses.replace(options, rank=options.ranks(params.config))  # however they were given
        key = hashlib.sha256(json.dumps([params.config.to_dict(), dataclasses.asdict(chosen)], default=int).encode())
        key.update(rows.tobytes())
        for leaf in leaves_in_order(params.weights):
            key.update(digest(leaf).to_bytes(4, "little"))
        identity = self._directory / "calibration.id"
        others = [path for path in self._directory.iterdir() if path.name != f"{identity.name}.tmp"]
        if others and not identity.exists():
            raise JsparseError(f"{self._directory} is in the way: it is wanted for the state of the calibration")
        if identity.exists() and identity.read_text() != key.hexdigest():
            raise JsparseError(
                f"{self._directory} holds an unfinished calibration of another model, text or options; remove it, or "
                "run that calibration again to finish it"
            )
        _replace(identity, lambda file: file.write(key.hexdigest().encode()))

    def resume(self) -> tuple[int, np.ndarray | None]:
        """The first layer to fit and the hidden states that enter it."""
        for layer in reversed(range(self._config.num_layers)):
            hidden = self._hidden(layer)
            if hidden.exists() and all(self._layer(done).exists() for done in range(layer + 1)):
                return layer + 1, self._read(hidden)
        return 0, None

    def write_layer(self, layer: int, predictor: Predictor, report: LayerReport, hidden: np.ndarray) -> None:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(predictor)]
        leaves = [leaf.view(np.uint16) if leaf.dtype.name == "bfloat16" else leaf for leaf in leaves]
        fields = json.dumps(dataclasses.asdict(report))
        _replace(self._layer(layer), lambda file: np.savez(file, *leaves, report=fields))
        _replace(self._hidden(layer), lambda file: np.save(file, hidden))
        self._hidden(layer - 1).unlink(missing_ok=True)

    def read_layer(self, layer: int) -> tuple[Predictor, LayerReport]:
        with self._read(self._layer(layer)) as saved:
            report = LayerReport(**json.loads(str(saved["report"])))
            leaves = [saved[f"arr_{i}"] for i in range(len(saved.files) - 1)]
        leaves = [jnp.asarray(leaf.view(jnp.bfloat16) if leaf.dtype == np.uint16 else leaf) for leaf in leaves]
        if self._options.bits == 16:
            return Predictor(*leaves), report
        a_values, a_scale, b_values, b_scale, *vectors = leaves  # bias, and since 0.2 the rate
        a = restore_rows(a_values, a_scale, self._options.bits, self._config.hidden_size)
        return Predictor(a, restore_rows(b_values, b_scale, self._options.bits, report.rank), *vectors), report

    def _read(self, path: Path) -> Any:
        try:
            return np.load(path)
        except (OSError, EOFError, ValueError) as error:
            raise JsparseError(f"{path} is damaged; remove {self._directory} to calibrate anew") from error

    def _layer(self, layer: int) -> Path:
        return self._directory / f"layer_{layer}.npz"

    def _hidden(self, layer: int) -> Path:
        return self._directory / f"hidden_{layer}.npy"


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file under a temporary name and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
