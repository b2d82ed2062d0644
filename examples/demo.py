"""Fit predictors for the shipped model, then decode densely and sparsely. `make demo` runs this."""

import jsparse
from jsparse.calibrate import default_texts, fit_with_progress, print_reports
from jsparse.generation import Statistics

PROMPT = ">>> 37 + 58 - 12\n"
NEW_TOKENS = 100


def timed(params: jsparse.Params, sparse: bool) -> tuple[str, Statistics]:
    """A completion and its statistics, of the second of two identical runs so that compilation is not timed."""
    statistics: list[Statistics] = []
    for _ in range(2):
        text = jsparse.generate(params, PROMPT, max_new_tokens=NEW_TOKENS, sparse=sparse, on_finish=statistics.append)
    return text, statistics[-1]


def main() -> None:
    params, reports = fit_with_progress(jsparse.load("default"), default_texts("default"))
    print_reports(reports)
    for name, sparse in (("dense", False), ("sparse", True)):
        text, statistics = timed(params, sparse)
        print(
            f"\n{name}: {statistics.tokens_per_second:.0f} tokens/s, "
            f"{statistics.rows_read:.1%} of the FFN weight rows read\n{PROMPT}{text}"
        )


if __name__ == "__main__":
    main()
