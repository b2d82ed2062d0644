"""The command `info`: describe a checkpoint."""

import argparse

import jax

from jsparse.arrays import storage_of
from jsparse.checkpoints.open import load
from jsparse.cli.command import check_output
from jsparse.model.config import ModelConfig
from jsparse.model.parameters import by_path
from jsparse.model.weights import Params


def run(args: argparse.Namespace) -> None:
    """Run the command with parsed arguments."""
    check_output()
    params = load(args.model, dtype=args.dtype, ffn=args.ffn)
    for name, value in describe_model(params).items():
        print(f"{name:>20}: {value}")


def describe_model(params: Params) -> dict[str, str]:
    """What a user wants to know of a model, by name."""
    c = params.config
    stored = by_path(params.weights)
    dtypes = sorted({str(storage_of(leaf)) for leaf in stored.values()})
    lines = {
        "name": c.name or "-",
        "layers": f"{c.num_layers}",
        "hidden size": f"{c.hidden_size}",
        "FFN": f"{c.ffn_kind}, {c.intermediate_size} neurons"
        + (f", threshold {c.ffn_threshold}" if c.ffn_kind == "fatrelu" else ""),
        "attention": f"{c.num_heads} heads, {c.num_kv_heads} key/value heads of {c.head_dim}" + _window(c),
        "vocabulary": f"{c.vocab_size}",
        "context": f"{c.context_length} tokens",
        "weights": f"{_megabytes(stored)} ({', '.join(dtypes)})",
        "tokenizer": "yes" if params.tokenizer else "none",
        "predictors": "none; fit them with python -m jsparse.calibrate"
        if c.is_sparse
        else f"none; a {c.ffn_kind} FFN has no zeros to predict",
    }
    if params.predictors is not None:
        ranks = sorted({predictor.rank for predictor in params.predictors})
        bits = storage_of(params.predictors[0].a).bits
        lines["predictors"] = f"rank {', '.join(map(str, ranks))}, {bits} bits, {_megabytes(params.predictors)}"
    return lines


def _window(config: ModelConfig) -> str:
    """How many positions a token sees, and in how many layers if not in all; empty without a window."""
    windowed = sum(config.window(layer) is not None for layer in range(config.num_layers))
    if not windowed:
        return ""
    layers = "" if windowed == config.num_layers else f" in {windowed} of {config.num_layers} layers"
    return f", sliding window {config.sliding_window}{layers}"


def _megabytes(tree) -> str:
    return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6:,.1f} MB"
