"""`python -m convert SRC DST`: a Hugging Face checkpoint to a jsparse directory, and the other ways round."""

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsparse
from convert import ConversionError, export_predictors, import_predictors, to_huggingface
from convert.files import check_destination, check_writable
from jsparse.arrays import DTYPES
from jsparse.checkpoints.native import check_new
from jsparse.cli.command import Parser, run_command
from jsparse.directories import read_path
from jsparse.model.ffn import HF_KINDS


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m convert",
        description="Convert a Hugging Face checkpoint to a jsparse directory. SRC may also be a jsparse directory, to "
        "add predictors to it or to write it in another form.",
    )
    parser.add_argument("source", metavar="SRC", help="Hugging Face or jsparse directory, or default")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to make")
    parser.add_argument("--ffn", choices=HF_KINDS, help="FFN kind, where config.json does not tell the truth")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the matrices (default: as stored)")
    parser.add_argument("--force", action="store_true", help="replace a jsparse directory at DST")
    parser.add_argument("--import-predictors", metavar="DIR", help="take the predictors from PowerInfer files")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--export-predictors", action="store_true", help="make DST a folder of PowerInfer files")
    other.add_argument("--to-huggingface", action="store_true", help="make DST a Hugging Face directory")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 on a mistake of the user's, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    with _log_on_stdout():
        run_command(lambda: _run(options))


@contextlib.contextmanager
def _log_on_stdout() -> Iterator[None]:
    """Print what `convert` logs, the FFN kind above all, and nothing of it on stderr."""
    log, handler = logging.getLogger("convert"), logging.StreamHandler(sys.stdout)
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def _run(options: argparse.Namespace) -> None:
    options.destination = read_path(options.destination, "DST")
    if options.source != "default":
        options.source = read_path(options.source, "SRC")
    _check_options(options)
    params = jsparse.load(options.source, dtype=options.dtype, ffn=options.ffn)
    if options.import_predictors:
        params = dataclasses.replace(params, predictors=import_predictors(options.import_predictors, params.config))
    if options.export_predictors:
        export_predictors(params, options.destination)
    elif options.to_huggingface:
        to_huggingface(params, options.destination)
        if params.predictors is not None:
            print("the predictors were left out: a Hugging Face checkpoint has no place for them (--export-predictors)")
    else:
        jsparse.save(params, options.destination, force=options.force)
    print(f"wrote {options.destination}")


def _check_options(options: argparse.Namespace) -> None:
    source, destination = Path(options.source).resolve(), options.destination.resolve()
    if options.source != "default" and (source.is_relative_to(destination) or destination.is_relative_to(source)):
        raise ConversionError(f"SRC {options.source} and DST {options.destination} must not lie in each other")
    if options.force and (options.export_predictors or options.to_huggingface):
        raise ConversionError("--force replaces jsparse directories only; remove DST yourself or choose another name")
    if options.export_predictors or options.to_huggingface:
        check_destination(options.destination)
    if options.import_predictors and not Path(options.import_predictors).is_dir():
        raise ConversionError(f"{options.import_predictors} is not a directory of predictor files")
    check_new(options.destination, force=options.force)
    check_writable(options.destination)


if __name__ == "__main__":
    main()
