"""The command `generate`: continue a prompt, streaming to the terminal."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape

from jsparse.checkpoints.open import load
from jsparse.cli.command import add_model, check_output
from jsparse.decoding.generate import generate
from jsparse.decoding.statistics import Statistics
from jsparse.errors import JsparseError
from jsparse.executors.select import EXECUTORS
from jsparse.model.cache import KV_DTYPES
from jsparse.model.weights import Params


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model(command)
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
    command.add_argument(
        "--kv-dtype", choices=KV_DTYPES, help="what keys and values are stored in (default: as the model's embedding)"
    )


def run(args: argparse.Namespace) -> None:
    """Run the command with parsed arguments."""
    check_output()
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
        kv_dtype=args.kv_dtype,
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
