"""Fit predictors for the shipped model, then decode densely and sparsely. `make demo` runs this."""

import statistics

import jsparse
from jsparse.cli.calibrate import fit_with_progress, print_reports
from jsparse.executors.select import select_executor
from jsparse.predictors.texts import default_texts

PROMPT = ">>> 37 + 58 - 12\n"
NEW_TOKENS = 100
RUNS = 5


def timed(params: jsparse.Params, sparse: bool) -> tuple[str, float, float]:
    """A completion, tokens/s (median of several identical runs after one that compiles), and share of rows read."""
    runs: list = []
    for _ in range(RUNS + 1):
        text = jsparse.generate(params, PROMPT, max_new_tokens=NEW_TOKENS, sparse=sparse, on_finish=runs.append)
    return text, statistics.median(run.tokens_per_second for run in runs[1:]), runs[-1].rows_read


def main() -> None:
    params, reports = fit_with_progress(jsparse.load("default"), default_texts("default"))
    print_reports(reports)
    print(f"executor: {select_executor().name}")
    print("Sparse decoding leaves out what the predictors miss: the texts may part after some lines.")
    for name, sparse in (("dense", False), ("sparse", True)):
        text, speed, rows_read = timed(params, sparse)
        print(f"\n{name}: {speed:.0f} tokens/s, {rows_read:.1%} of the FFN weight rows read\n{PROMPT}{text}")


if __name__ == "__main__":
    main()
