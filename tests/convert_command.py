"""`python -m convert`, run in this process."""

from convert.__main__ import main


def exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return 0
