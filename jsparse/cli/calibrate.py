"""The command `python -m jsparse.calibrate`: fit predictors for a model, once."""

import argparse
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jsparse.api import fit_predictors
from jsparse.arrays import DTYPES
from jsparse.checkpoints.native import check_new, save
from jsparse.checkpoints.open import load
from jsparse.cli.command import Parser, run_command
from jsparse.directories import read_path
from jsparse.errors import JsparseError
from jsparse.model.ffn import HF_KINDS, KINDS
from jsparse.model.weights import Params
from jsparse.predictors.options import CalibrationOptions, LayerReport
from jsparse.predictors.texts import default_texts, read_prompts


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 2 on a user's mistake."""
    parser = Parser(prog="python -m jsparse.calibrate", description=__doc__.splitlines()[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    run_command(lambda: run(args))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options; defaults are those of `CalibrationOptions`."""
    defaults = CalibrationOptions()
    parser.add_argument("model", help="jsparse directory, Hugging Face checkpoint, or 'default'")
    parser.add_argument("--prompts", type=Path, help=".txt, or .jsonl with 'text' or chat 'messages' per line")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the model with predictors to")
    parser.add_argument("--force", action="store_true", help="replace the output directory")
    parser.add_argument("--rank", type=_ranks, help="one rank, or one per layer with commas (default: hidden size / 4)")
    parser.add_argument("--bits", type=int, default=defaults.bits, help="16, 8 or 4 (default %(default)s)")
    parser.add_argument(
        "--sparsity",
        type=float,
        default=defaults.sparsity,
        help="share of the zeros to skip, 0 to 1 (default %(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="calibration tokens (default %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="chooses the tokens (default %(default)s)")
    parser.add_argument("--no-whiten", dest="whiten", action="store_false", help="plain SVD of the gate (ablation)")
    parser.add_argument("--no-center", dest="center", action="store_false", help="keep the data's mean (ablation)")
    parser.add_argument("--no-refit", dest="refit", action="store_false", help="keep the SVD's b as it is (ablation)")
    parser.add_argument(
        "--bias", choices=("neuron", "layer", "none"), default=defaults.bias, help="thresholds (default %(default)s)"
    )
    parser.add_argument(
        "--importance",
        choices=("gate", "hidden", "output"),
        default=defaults.importance,
        help="cost of a skip (ablation; default %(default)s)",
    )
    parser.add_argument(
        "--silenced",
        choices=("spare", "stop"),
        default=defaults.silenced,
        help="rule for rare neurons (default %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weight matrices (default: as stored)")
    parser.add_argument(
        "--ffn", choices=tuple(kind for kind in HF_KINDS if KINDS[kind].has_zeros), help="FFN kind of a HF checkpoint"
    )
    parser.add_argument("--plot", type=Path, help="write a PNG of sparsity and recall per layer")


def run(args: argparse.Namespace) -> None:
    """Run the command with parsed arguments."""
    args.output = read_path(args.output, "--output")
    check_new(args.output, force=args.force)
    if args.plot:
        check_matplotlib()
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(CalibrationOptions)}
    params = load(args.model, dtype=args.dtype, ffn=args.ffn)
    CalibrationOptions(**options).check(params.config)
    texts = default_texts(args.model) if args.prompts is None else read_prompts(args.prompts)
    output = Path(os.path.realpath(args.output))
    state_dir = output.with_name(f"{output.name}.unfinished")
    if state_dir.exists():
        print(f"continuing the calibration in {state_dir}")
    params, reports = fit_with_progress(params, texts, state_dir=state_dir, **options)
    save(params, args.output, force=args.force)
    shutil.rmtree(state_dir)
    print_reports(reports)
    if args.plot:
        plot_reports(reports, args.plot)
        print(f"wrote {args.plot}")
    print(f"wrote {args.output}")


def fit_with_progress(params: Params, texts: list[Any], **options: Any) -> tuple[Params, list[LayerReport]]:
    """`fit_predictors` with a progress bar on stderr where that is a terminal; the reports come back too."""
    reports: list[LayerReport] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("calibrating layers", total=params.config.num_layers)

        def on_layer(report: LayerReport) -> None:
            reports.append(report)
            progress.advance(task)

        return fit_predictors(params, texts, on_layer=on_layer, **options), reports


def print_reports(reports: list[LayerReport]) -> None:
    """The per-layer table."""
    table = Table(title="predictors")
    for column in ("layer", "rank", "measured sparsity", "predicted skip share", "recall", "stopped by"):
        table.add_column(column, justify="right")
    for r in reports:
        stop = "limit" if r.stopped_early else "target"
        table.add_row(str(r.layer), str(r.rank), f"{r.sparsity:.1%}", f"{r.skipped:.1%}", f"{r.recall:.2%}", stop)
    Console().print(table)


def check_matplotlib() -> None:
    """Raises: JsparseError: matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise JsparseError("--plot needs matplotlib: pip install matplotlib") from error


def plot_reports(reports: list[LayerReport], path: Path) -> None:
    """A PNG with sparsity, skip share and recall per layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = [r.layer for r in reports]
    for label, values in (
        ("measured sparsity", [r.sparsity for r in reports]),
        ("predicted skip share", [r.skipped for r in reports]),
        ("recall of active neurons", [r.recall for r in reports]),
    ):
        axes.plot(layers, values, marker="o", label=label)
    axes.set(xlabel="layer", ylabel="share", ylim=(0, 1.02), xticks=layers if len(layers) <= 20 else layers[::4])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _ranks(text: str) -> int | tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or numbers with commas between") from None
    return ranks[0] if len(ranks) == 1 else ranks
