"""The command `jsparse`, or `python -m jsparse`: generate, calibrate, info."""

import jsparse
from jsparse.cli import calibrate, generate, info
from jsparse.cli.command import Parser, add_model, run_command


def main(argv: list[str] | None = None) -> None:
    """Entry point; exit code 2 on a user's mistake."""
    parser = Parser(prog="jsparse", description="Contextual sparsity for ReGLU language models.")
    parser.add_argument("--version", action="version", version=f"jsparse {jsparse.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("generate", help="continue a prompt, streaming to the terminal")
    generate.add_arguments(command)
    command.set_defaults(run=generate.run)

    command = commands.add_parser("calibrate", help="fit predictors for a model")
    calibrate.add_arguments(command)
    command.set_defaults(run=calibrate.run)

    command = commands.add_parser("info", help="describe a checkpoint")
    add_model(command)
    command.set_defaults(run=info.run)

    args = parser.parse_args(argv)
    run_command(lambda: args.run(args))
