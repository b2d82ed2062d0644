"""Multi-step arithmetic problems worked line by line: training text and an exact-match task."""

import dataclasses
import random


@dataclasses.dataclass(frozen=True)
class Problem:
    """A chain of additions and subtractions such as

    >>> 37 + 58 - 12
    37 + 58 = 95
    95 - 12 = 83
    answer 83
    """

    prompt: str
    solution: str
    answer: int

    @property
    def text(self) -> str:
        return self.prompt + self.solution


def make_problem(rng: random.Random) -> Problem:
    """A problem of two or three operations on numbers below 100; no intermediate result is negative."""
    value = rng.randint(1, 99)
    expression, lines = str(value), []
    for _ in range(rng.randint(2, 3)):
        operand = rng.randint(1, 99)
        sign = "-" if operand <= value and rng.random() < 0.5 else "+"
        result = value + operand if sign == "+" else value - operand
        lines.append(f"{value} {sign} {operand} = {result}\n")
        expression += f" {sign} {operand}"
        value = result
    return Problem(f">>> {expression}\n", "".join(lines) + f"answer {value}\n\n", value)


def make_text(num_problems: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(make_problem(rng).text for _ in range(num_problems))
