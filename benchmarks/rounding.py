"""What rounding weights costs: `python -m benchmarks.rounding [MODEL] [--tokens 20000] [--window 512]`.

KL(float32 || rounded) of the next token on text that was not calibrated on, in nats per token, through the CPU
executor where it runs: ours and llama.cpp's Q4_0 (as the package gguf rounds), of the matrices alone, and of embedding
and head beside our int4 matrices. Differences are paired by window, with bootstrap intervals.
"""

import argparse

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, quants
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse
from benchmarks.report import interval, positive, print_json
from jsparse.arrays import Matrix, dequantize
from jsparse.evaluation.scoring import held_out_rows, teacher_forced
from jsparse.executors.select import select_executor
from jsparse.model.parameters import by_path, make_weights, parameters
from jsparse.model.weights import Weights
from jsparse.rounding import cast, quantize_groups

UNIFORM = jnp.arange(-8, 8, dtype=jnp.int8)


def q4_0(matrix: Matrix) -> Matrix:
    """What Q4_0 leaves of a matrix, groups along its inputs as in a GGUF file."""
    kind = GGMLQuantizationType.Q4_0
    exact = np.asarray(dequantize(matrix))
    return jnp.asarray(quants.dequantize(quants.quantize(exact, kind), kind))


def transposed(round_matrix):
    """A rounding whose groups run along the rows of the matrix's transpose."""
    return lambda matrix: round_matrix(jnp.asarray(dequantize(matrix)).T).T


def rounded(params: jsparse.Params, rules: dict) -> Weights:
    """The weights with every array of a role, or of a name, rounded as its rule says."""
    table, leaves = parameters(params.config), by_path(params.weights)

    def leaf(path: str, _) -> Matrix:
        name = path.rpartition("/")[2]
        rule = rules.get(name) or rules.get(table[path].role)
        return rule(leaves[path]) if rule else leaves[path]

    return make_weights(params.config, leaf)


def _to(storage: str):
    return lambda matrix: cast(matrix, storage)


_INT4 = {"matrix": _to("int4:32")}
RULES: dict[str, dict] = {
    "Q4_0": {"matrix": q4_0, "down_t": transposed(q4_0)},
    "int4:32 with Q4_0's codebook": {"matrix": lambda m: quantize_groups(dequantize(m), UNIFORM)},
    "int4:32": _INT4,
    "int4:32, down in groups of neurons": _INT4 | {"down_t": transposed(lambda m: dequantize(cast(m, "int4:32")))},
    "int4:32, down in int8": _INT4 | {"down_t": _to("int8")},
    "int4:32, embedding and head int8": _INT4 | {role: _to("int8") for role in ("embed", "head")},
    "int4:32, embedding and head int4:32": _INT4 | {role: _to("int4:32") for role in ("embed", "head")},
    "int8": {"matrix": _to("int8")},
}
"""Versions by name: each maps roles or names of matrices to the function that rounds them."""


def divergences(params: jsparse.Params, rows: np.ndarray, versions: dict[str, Weights]) -> dict[str, np.ndarray]:
    """KL(params || version) of every row, the mean over its tokens."""
    executor = select_executor()
    found: dict[str, list[float]] = {name: [] for name in versions}
    for row in track(rows, "Windows", console=Console(stderr=True), transient=True):

        def log_p(weights, row=row):
            return np.asarray(teacher_forced(weights, None, row, params.config, executor)[0])

        exact = log_p(params.weights)
        for name, weights in versions.items():
            found[name].append(np.sum(np.exp(exact) * (exact - log_p(weights)), axis=-1).mean())
    return {name: np.asarray(values) for name, values in found.items()}


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser of the arguments that choose a model and its text."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", nargs="?", default="default", help="with text of the shipped model, in its own tokens")
    made.add_argument("--tokens", type=positive, default=20_000, help="at least, default %(default)s")
    made.add_argument("--window", type=positive, help="tokens of a window, default: the model's context")
    return made


def model_and_rows(args: argparse.Namespace) -> tuple[jsparse.Params, np.ndarray]:
    """Load the model in float32, and windows of held-out text with as many tokens as the command line asks for."""
    params = jsparse.load(args.model, dtype="float32")
    window = min(args.window or params.config.context_length, params.config.context_length)
    return params, held_out_rows(params, -(-args.tokens // window), window)


def main() -> None:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--rounding", choices=RULES, nargs="+", default=list(RULES), help="default: all")
    args = command.parse_args()
    params, rows = model_and_rows(args)
    made = {name: rounded(params, RULES[name]) for name in dict.fromkeys(["Q4_0", *args.rounding])}
    divergence = divergences(params, rows, made)
    results, base = [], divergence["Q4_0"]
    table = Table(title=f"{params.config.name}: {rows.size:,} tokens, KL to float32 in nats per token")
    for column in ("", "KL", "95%", "minus Q4_0's", "95%", "MB of block matrices"):
        table.add_column(column, justify="right")
    for name, found in divergence.items():
        entry = {"rounding": name, "kl": float(found.mean()), "interval": interval(found)}
        entry |= {"difference": float((found - base).mean()), "difference_interval": interval(found - base)}
        results.append(entry)
        size = sum(leaf.nbytes for path, leaf in by_path(made[name]).items() if path.startswith("layers"))
        cells = [f"{entry['kl']:.5f}", "{:.5f} to {:.5f}".format(*entry["interval"]), f"{entry['difference']:+.5f}"]
        cells += ["{:+.5f} to {:+.5f}".format(*entry["difference_interval"]), f"{size / 1e6:.2f}"]
        table.add_row(name, *cells)
    Console(width=150).print(table)
    print_json(results)


if __name__ == "__main__":
    main()
