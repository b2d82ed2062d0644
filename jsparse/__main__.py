"""The command `jsparse`, or `python -m jsparse`: generate, calibrate, info."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import jax
from rich.console import Console
from rich.markup import escape

from jsparse import calibrate
from jsparse.arrays import DTYPES
from jsparse.checkpoints.open import load
from jsparse.commands import Parser, run_command
from jsparse.decoding.generate import generate
from jsparse.decoding.statistics import Statistics
from jsparse.errors import JsparseError
from jsparse.executors.select import EXECUTORS
from jsparse.model.config import FFN_KINDS
from jsparse.model.weights import Params


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 2 on a user's mistake."""
    parser = Parser(prog="jsparse", description="Contextual sparsity for ReGLU language models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("generate", help="continue a prompt, streaming to the terminal")
    _add_model(command)
    command.add_argument("prompt", help="text, or - to read standard input")
    command.add_argument("--chat", action="store_true", help="send the prompt through the chat template")
    command.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to add (default %(default)s)")
    command.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the most likely token")
    command.add_argument("--top-k", type=int, help="draw among this many of the most likely tokens (default: all)")
    command.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the fewest with this probability together"
    )
    command.add_argument("--seed", type=int, default=0, help="of the random draws (default %(default)s)")
    command.add_argument("--stop", action="append", default=[], help="end at this text; may be repeated")
    command.add_argument("--dense", action="store_true", help="decode densely even where predictors are fitted")
    command.add_argument(
        "--executor", choices=("auto", *EXECUTORS), default="auto", help="what computes; auto takes the first that can"
    )
    command.set_defaults(run=_generate)

    command = commands.add_parser("calibrate", help="fit predictors for a model")
    calibrate.add_arguments(command)
    command.set_defaults(run=calibrate.calibrate)

    command = commands.add_parser("info", help="describe a checkpoint")
    _add_model(command)
    command.set_defaults(run=_info)

    args = parser.parse_args(argv)
    run_command(lambda: args.run(args))


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="jsparse directory, Hugging Face checkpoint, or 'default'")
    command.add_argument("--dtype", choices=DTYPES, help="of the weight matrices (default: as stored)")
    command.add_argument("--ffn", choices=FFN_KINDS, help="FFN kind of a HF checkpoint")


def _generate(args: argparse.Namespace) -> None:
    _check_output()
    text = args.prompt
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsparseError(f"the prompt on standard input is not UTF-8 text (byte {error.start})") from error
        except AttributeError:
            raise JsparseError("the prompt is -, but standard input is closed") from None
    statistics: list[Statistics] = []
    console = Console(stderr=True)
    with console.status(f"loading {escape(args.model)}") as status:
        params = load(args.model, dtype=args.dtype, ffn=args.ffn)
        status.update(f"compiling {params.config.num_layers} layers, or taking them from the cache")
        pieces = _stream(params, text, args, statistics.append)
        opening = list(itertools.islice(pieces, 2))  # of the prefill and of the first decode steps
    for piece in itertools.chain(opening, pieces):
        print(piece, end="", flush=True)
    print(f"\n{describe(*statistics)}", file=sys.stderr)


def _stream(
    params: Params, text: str, args: argparse.Namespace, on_finish: Callable[[Statistics], None]
) -> Iterator[str]:
    return generate(
        params,
        [{"role": "user", "content": text}] if args.chat else text,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        stream=True,
        executor=args.executor,
        sparse=False if args.dense else None,
        on_finish=on_finish,
    )


def describe(statistics: Statistics) -> str:
    """One line: tokens, speed, share of FFN weight rows read."""
    if not statistics.decoded_tokens:
        return "[the prompt's own pass chose all tokens: none were decoded]"
    return (
        f"[{statistics.decoded_tokens} tokens decoded, {statistics.tokens_per_second:.1f} tokens/s with compilation, "
        f"{statistics.rows_read:.1%} of the FFN weight rows read]"
    )


def _check_output() -> None:
    if sys.stdout is None:
        raise JsparseError("standard output is closed, and there the answer goes")


def _info(args: argparse.Namespace) -> None:
    _check_output()
    params = load(args.model, dtype=args.dtype, ffn=args.ffn)
    for name, value in describe_model(params).items():
        print(f"{name:>20}: {value}")


def describe_model(params: Params) -> dict[str, str]:
    """What a user wants to know of a model, by name."""
    c = params.config
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params.weights)})
    lines = {
        "name": c.name or "-",
        "layers": f"{c.num_layers}",
        "hidden size": f"{c.hidden_size}",
        "FFN": f"{c.ffn_kind}, {c.intermediate_size} neurons"
        + (f", threshold {c.ffn_threshold}" if c.ffn_kind == "fatrelu" else ""),
        "attention": f"{c.num_heads} heads, {c.num_kv_heads} key/value heads of {c.head_dim}"
        + (f", sliding window {c.sliding_window}" if c.sliding_window else ""),
        "vocabulary": f"{c.vocab_size}",
        "context": f"{c.context_length} tokens",
        "weights": f"{_megabytes(params.weights)} ({', '.join(dtypes)})",
        "tokenizer": "yes" if params.tokenizer else "none",
        "predictors": "none; fit them with python -m jsparse.calibrate"
        if c.is_sparse
        else f"none; a {c.ffn_kind} FFN has no zeros to predict",
    }
    if params.predictors is not None:
        ranks = sorted({predictor.rank for predictor in params.predictors})
        bits = getattr(params.predictors[0].a, "bits", 16)
        lines["predictors"] = f"rank {', '.join(map(str, ranks))}, {bits} bits, {_megabytes(params.predictors)}"
    return lines


def _megabytes(tree) -> str:
    return f"{sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
