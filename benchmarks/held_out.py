"""The benchmarks that measure divergences take their model and held-out text from here, by the command line."""

import argparse

import numpy as np

import jsparse
from benchmarks.report import positive
from jsparse.evaluation.scoring import held_out_rows


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Compute KL(exact || other) of log-probabilities (T, V), in nats, the mean over the tokens."""
    return float(np.sum(np.exp(exact) * (exact - other), axis=-1).mean())


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser of the arguments that choose a model and its text."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", nargs="?", default="default", help="with text of the shipped model, in its own tokens")
    made.add_argument("--tokens", type=positive, default=20_000, help="at least, default %(default)s")
    made.add_argument("--window", type=positive, help="tokens of a window, default: the model's context")
    return made


def model_and_rows(command: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[jsparse.Params, np.ndarray]:
    """Load the model in float32, and windows of held-out text with as many tokens as the command line asks for."""
    try:
        params = jsparse.load(args.model, dtype="float32")
    except jsparse.JsparseError as error:
        command.error(str(error))
    if params.tokenizer is None:
        command.error(f"{args.model} has no tokenizer, and held-out text is in words")
    window = min(args.window or params.config.context_length, params.config.context_length)
    if window < 2:
        command.error(f"--window is {window}; it must be at least 2")
    rows = held_out_rows(params, -(-args.tokens // window), window)
    if not rows.size:
        command.error(f"no held-out text has windows of {window} tokens; choose another --window")
    return params, rows
