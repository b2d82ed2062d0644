"""What keys and values in int8 cost: `python -m benchmarks.kv_cache [MODEL] [--tokens 20000]`.

KL of the next token on text that was not calibrated on, in nats per token, through the CPU executor where it runs;
weights are float32. Also of the model with a bias of 100 on two channels of the first key head, as some models have
such biases: on channels that the rotary embedding turns fastest, and slowest, and on both of a pair.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jsparse
from benchmarks.held_out import divergence, model_and_rows, parser
from benchmarks.report import interval, print_json
from jsparse.evaluation.scoring import teacher_forced
from jsparse.executors.select import select_executor

BIAS = 100.0
PAIRS = (("float32", "bfloat16"), ("float32", "int8"), ("bfloat16", "int8"))


def biased(params: jsparse.Params, channels: tuple[int, int]) -> jsparse.Params:
    """The model with a large bias on some channels of its first key head."""
    config = params.config

    def with_bias(layer):
        linears = {name: getattr(layer.attention, name) for name in "qkv"}
        biases = {name: np.zeros(linear.rows.shape[0], np.float32) for name, linear in linears.items()}
        biases["k"][list(channels)] = BIAS
        linears = {name: dataclasses.replace(linears[name], bias=jnp.asarray(biases[name])) for name in "qkv"}
        return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **linears))

    weights = dataclasses.replace(params.weights, layers=tuple(map(with_bias, params.weights.layers)))
    return dataclasses.replace(params, config=dataclasses.replace(config, attention_bias="qkv"), weights=weights)


def divergences(params: jsparse.Params, rows: np.ndarray, name: str) -> dict[tuple[str, str], np.ndarray]:
    """KL of every pair of dtypes and row, the mean over its tokens."""
    executor = select_executor()
    found: dict[tuple[str, str], list[float]] = {pair: [] for pair in PAIRS}
    for row in track(rows, name, console=Console(stderr=True), transient=True):
        operands = params.weights, None, row, params.config, executor
        log_p = {kv_dtype: np.asarray(teacher_forced(*operands, kv_dtype)[0]) for kv_dtype in {*sum(PAIRS, ())}}
        for first, second in PAIRS:
            found[first, second].append(divergence(log_p[first], log_p[second]))
    return {pair: np.asarray(values) for pair, values in found.items()}


def main() -> None:
    command = parser(__doc__.splitlines()[0])
    params, rows = model_and_rows(command, command.parse_args())
    half = params.config.head_dim // 2
    models = {
        "as it is": params,
        "biases on channels that turn fast": biased(params, (0, 1)),
        "biases on channels that turn slowly": biased(params, (half - 2, half - 1)),
        "biases on a pair that turns slowly": biased(params, (half - 1, 2 * half - 1)),
    }
    table = Table(title=f"{params.config.name}: {rows.size:,} tokens, KL by what keys and values are stored in, nats")
    for column in ("model", *(f"{first} || {second}, 95%" for first, second in PAIRS)):
        table.add_column(column, justify="right")
    results = []
    for name, model in models.items():
        found = divergences(model, rows, name)
        results += [
            {"model": name, "pair": pair, "kl": float(values.mean()), "interval": interval(values)}
            for pair, values in found.items()
        ]
        cells = ("{:.6f}, {:.6f} to {:.6f}".format(values.mean(), *interval(values)) for values in found.values())
        table.add_row(name, *cells)
    Console(width=160).print(table)
    print_json(results)


if __name__ == "__main__":
    main()
