"""What rounding weights costs: `python -m benchmarks.rounding [MODEL] [--tokens 20000] [--window 512]`.

KL(float32 || rounded) of the next token on text that was not calibrated on, in nats per token, through the CPU
executor where it runs: ours and llama.cpp's Q4_0 (as the package gguf rounds) and Q4_K_M (as llama.cpp does), of the
matrices alone, and of embedding and head beside our int4 matrices. Differences are paired by window, with bootstrap
intervals.
"""

import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse
from benchmarks.gguf_files import quantize_gguf, read_gguf, tensor_name, write_gguf
from benchmarks.held_out import divergence, model_and_rows, parser
from benchmarks.report import interval, print_json
from jsparse.arrays import GROUP, Matrix, dequantize
from jsparse.evaluation.scoring import teacher_forced
from jsparse.executors.select import select_executor
from jsparse.model.parameters import by_path, make_weights, parameters
from jsparse.model.weights import Weights
from jsparse.rounding import cast, quantize_groups

UNIFORM = jnp.arange(-8, 8, dtype=jnp.int8)

Rounded = tuple[Matrix, int]
"""A matrix after rounding, and the bytes that it takes."""


def q4_0(matrix: Matrix) -> Rounded:
    """What Q4_0 leaves of a matrix, groups along its inputs as in a GGUF file."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q4_0
    blocks = quants.quantize(np.asarray(dequantize(matrix)), kind)
    return jnp.asarray(quants.dequantize(blocks, kind)), blocks.nbytes


def uniform(matrix: Matrix) -> Rounded:
    """Round to int4:32 with the codebook of Q4_0."""
    made = quantize_groups(dequantize(matrix), UNIFORM)
    return made, made.nbytes


def to(storage: str) -> Callable[[Matrix], Rounded]:
    """Make a function that rounds to a storage of ours."""

    def round_matrix(matrix: Matrix) -> Rounded:
        made = cast(matrix, storage)
        return made, made.nbytes

    return round_matrix


def transposed(round_matrix: Callable[[Matrix], Rounded]) -> Callable[[Matrix], Rounded]:
    """Make a function that rounds in groups along the rows of the matrix's transpose."""

    def of_transpose(matrix: Matrix) -> Rounded:
        made, size = round_matrix(jnp.asarray(dequantize(matrix)).T)
        return dequantize(made).T, size

    return of_transpose


_INT4 = {"matrix": to("int4:32")}
RULES: dict[str, dict[str, Callable[[Matrix], Rounded]]] = {
    "Q4_0": {"matrix": q4_0, "down_t": transposed(q4_0)},
    "int4:32 with Q4_0's codebook": {"matrix": uniform},
    "int4:32": _INT4,
    "int4:32, down in groups of neurons": _INT4 | {"down_t": transposed(to("int4:32"))},
    "int4:32, down in int8": _INT4 | {"down_t": to("int8")},
    "int4:32, embedding and head int8": _INT4 | {role: to("int8") for role in ("embed", "head")},
    "int4:32, embedding and head int4:32": _INT4 | {role: to("int4:32") for role in ("embed", "head")},
    "int8": {"matrix": to("int8")},
}
"""Versions by name: each maps roles or names of matrices to the function that rounds them."""
Q4_K_M = "Q4_K_M"
"""A version that llama.cpp makes, which gives some matrices more bits than others: it takes llama-cpp-python."""
PACKAGES = {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}
"""What to install for a module; the second is for Q4_K_M alone."""


class Version(NamedTuple):
    """A model's weights after rounding, and how many bits its block matrices take per weight."""

    weights: Weights
    bits: float


def rounded(params: jsparse.Params, rules: dict[str, Callable[[Matrix], Rounded]]) -> Version:
    """Round every array of the model for whose role or name there is a rule."""
    table = parameters(params.config)

    def leaf(path: str, matrix: Matrix) -> Rounded:
        rule = rules.get(path.rpartition("/")[2]) or rules.get(table[path].role)
        return rule(matrix) if rule else (matrix, matrix.nbytes)

    return _version(params, {path: leaf(path, matrix) for path, matrix in by_path(params.weights).items()})


def q4_k_m(params: jsparse.Params) -> Version:
    """Have llama.cpp round the block matrices to Q4_K_M, without an importance matrix."""
    leaves = by_path(params.weights)
    names = {path: name for path in leaves if (name := tensor_name(path))}
    exact = {name: _inputs_last(path, np.asarray(leaves[path])) for path, name in names.items()}
    head = leaves.get("head", leaves["embed"])
    exact |= {"token_embd.weight": np.asarray(leaves["embed"]), "output.weight": np.asarray(head)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "exact.gguf"
        write_gguf(path, params.config, "f32", lambda name, _: exact[name])
        found = read_gguf(quantize_gguf(path, "q4_k_m"))

    def leaf(path: str, matrix: Matrix) -> Rounded:
        if path not in names:
            return matrix, matrix.nbytes
        made, size = found[names[path]]
        return jnp.asarray(_inputs_last(path, made)), size

    return _version(params, {path: leaf(path, matrix) for path, matrix in leaves.items()})


def _inputs_last(path: str, matrix: np.ndarray) -> np.ndarray:
    """Transpose down_t, which GGUF stores the other way round; other matrices stay as they are."""
    return np.ascontiguousarray(matrix.T) if path.endswith("down_t") else matrix


def _version(params: jsparse.Params, leaves: dict[str, Rounded]) -> Version:
    table = parameters(params.config)
    matrices = [path for path in leaves if table[path].role == "matrix"]
    bits = 8 * sum(leaves[path][1] for path in matrices) / sum(math.prod(table[path].shape) for path in matrices)
    return Version(make_weights(params.config, lambda path, _: leaves[path][0]), bits)


def divergences(params: jsparse.Params, rows: np.ndarray, versions: dict[str, Weights]) -> dict[str, np.ndarray]:
    """KL(params || version) of every row, the mean over its tokens."""
    executor = select_executor()
    found: dict[str, list[float]] = {name: [] for name in versions}
    for row in track(rows, "Windows", console=Console(stderr=True), transient=True):

        def log_p(weights, row=row):
            return np.asarray(teacher_forced(weights, None, row, params.config, executor)[0])

        exact = log_p(params.weights)
        for name, weights in versions.items():
            found[name].append(divergence(exact, log_p(weights)))
    return {name: np.asarray(values) for name, values in found.items()}


def main() -> None:
    command = parser(__doc__.splitlines()[0])
    names = [*RULES, Q4_K_M]
    command.add_argument("--rounding", choices=names, nargs="+", default=list(RULES), help="default: all but Q4_K_M")
    args = command.parse_args()
    for module, package in PACKAGES.items():
        is_used = module == "gguf" or Q4_K_M in args.rounding
        if is_used and importlib.util.find_spec(module) is None:
            command.error(f"this takes the package {package}: pip install {package}")
    params, rows = model_and_rows(command, args)
    config = params.config
    if config.hidden_size % GROUP or config.intermediate_size % GROUP:
        command.error(f"Q4_0 has groups of {GROUP}; of {config.name or args.model} a row is no multiple of them")
    if Q4_K_M in args.rounding and not config.ffn_spec().up:
        command.error(f"{Q4_K_M} is made from a file of Llama's architecture; this model's FFN has no up matrix")
    made = {
        name: q4_k_m(params) if name == Q4_K_M else rounded(params, RULES[name])
        for name in dict.fromkeys(["Q4_0", *args.rounding])
    }
    measured = divergences(params, rows, {name: version.weights for name, version in made.items()})
    results, base = [], measured["Q4_0"]
    table = Table(title=f"{params.config.name}: {rows.size:,} tokens, KL to float32 in nats per token")
    for column in ("", "KL", "95%", "minus Q4_0's", "95%", "bits a weight"):
        table.add_column(column, justify="right")
    for name, found in measured.items():
        entry = {"rounding": name, "kl": float(found.mean()), "interval": interval(found)}
        entry |= {"difference": float((found - base).mean()), "difference_interval": interval(found - base)}
        entry["bits"] = made[name].bits
        results.append(entry)
        cells = [f"{entry['kl']:.5f}", "{:.5f} to {:.5f}".format(*entry["interval"]), f"{entry['difference']:+.5f}"]
        cells += ["{:+.5f} to {:+.5f}".format(*entry["difference_interval"]), f"{entry['bits']:.2f}"]
        table.add_row(name, *cells)
    Console(width=150).print(table)
    print_json(results)


if __name__ == "__main__":
    main()
