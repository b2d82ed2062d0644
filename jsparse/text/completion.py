"""Completions as they grow, as token ids or as text that a stop text ends."""

import itertools
from collections.abc import Sequence

import numpy as np

from jsparse.text.tokenizer import Tokenizer


class TokenCompletion:
    """A completion as token ids."""

    ended = False

    def __init__(self):
        self._ids: list[int] = []

    def extend(self, ids: Sequence[int], last: bool) -> np.ndarray:
        """Take new ids and return them."""
        self._ids += ids
        return np.asarray(ids, np.int32)

    def value(self) -> np.ndarray:
        return np.asarray(self._ids, np.int32)


class TextCompletion:
    """A completion as text: ended by the stop text that is complete first, which is left out.

    Stop texts are looked for in the text with its special tokens, as transformers does for `stop_strings`, so that
    "<|im_end|>" ends a completion; the completion itself has none of them.

    Attributes:
      ended: a stop text has come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.ended = False
        self._detokenizer = tokenizer.detokenizer(after=prompt)
        self._stops = stops
        self._pieces: list[str] = []
        # Text that may still become part of a stop text, special tokens among it, and which characters are visible.
        self._tail, self._visible = "", bytearray()

    def extend(self, ids: Sequence[int], last: bool) -> str:
        """Take new ids and return the text that is now certain: all of it if they are the last."""
        if self.ended:
            return ""
        for token in ids:
            self._append(*self._detokenizer.step(token))
        if last:
            self._append(self._detokenizer.end(), False)
        # A stop text cannot begin before the tail: `_certain` kept all that may be the beginning of one.
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._tail.find(stop)) >= 0]
        self.ended = bool(matches)
        return self._emit(min(matches)[1] if matches else len(self._tail) if last else self._certain())

    def value(self) -> str:
        return "".join(self._pieces)

    def _append(self, text: str, is_special: bool) -> None:
        self._tail += text
        self._visible += bytes([not is_special]) * len(text)

    def _emit(self, size: int) -> str:
        piece = "".join(itertools.compress(self._tail[:size], self._visible[:size]))
        self._tail, self._visible = self._tail[size:], self._visible[size:]
        self._pieces.append(piece)
        return piece

    def _certain(self) -> int:
        """Length of the tail without an end that may be the beginning of a stop text."""
        ends = [size for stop in self._stops for size in range(1, len(stop)) if self._tail.endswith(stop[:size])]
        return len(self._tail) - max(ends, default=0)
