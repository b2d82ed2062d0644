"""Token ids to text, one token at a time, in time linear in their number."""

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CONTEXT = 4
"""Tokens before one that a decoder of an unknown kind may look at."""


class Piece(NamedTuple):
    """What a token adds to a text: its characters, and whether it is a special token, which is not part of the text."""

    text: str
    is_special: bool


class Detokenizer:
    """The text of a growing sequence of tokens.

    A character comes as soon as its last byte has come, and characters that are complete are never lost, whatever
    follows them; bytes that are no UTF-8 become U+FFFD. All texts are decoded here, so that a stream and a whole text
    agree.
    """

    def __init__(self, vocabulary: "Vocabulary", after: Iterable[int] = ()):
        """Text follows the tokens `after`: some decoders drop the space of a text's first word, and a prompt may end
        inside a character."""
        self._vocabulary = vocabulary
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []
        self._is_first = True
        for token in after:
            self.step(token)

    def step(self, token: int) -> Piece:
        """Append a token."""
        if (name := self._vocabulary.special.get(token)) is not None:
            return Piece(name, True)
        added = self._vocabulary.bytes_of(token, self._context)
        self._context = [*self._context[1 - _CONTEXT :], token]
        if self._is_first and added:
            added = self._vocabulary.strip_first(added)
            self._is_first = False
        return Piece(self._bytes.decode(added), False)

    def end(self) -> str:
        """What is left: U+FFFD if the last character is cut."""
        return self._bytes.decode(b"", final=True)


class Vocabulary:
    """The bytes of every token, read off the decoder of a `tokenizers.Tokenizer`.

    Attributes:
      special: names of the special tokens by id.
      strip_first: what the decoder does to the first bytes of a text.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special = {token: entry.content for token, entry in added.items() if entry.special}
        self._known: dict[int, bytes] = {}
        self._to_bytes, self.strip_first = _read_decoder(backend.decoder)
        if self._to_bytes is _from_byte_level:  # added tokens are text as they stand
            self._known = {token: entry.content.encode() for token, entry in added.items()}

    def bytes_of(self, token: int, context: list[int]) -> bytes:
        """The token's bytes; nothing for an id that the vocabulary lacks. `context` are the tokens before it."""
        if (known := self._known.get(token)) is not None:
            return known
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if self._to_bytes is None:
            return self._difference(token, context)
        self._known[token] = self._to_bytes(name)
        return self._known[token]

    def _difference(self, token: int, context: list[int]) -> bytes:
        before = self._backend.decode(context, skip_special_tokens=False) if context else ""
        return self._backend.decode([*context, token], skip_special_tokens=False)[len(before) :].encode()


def _read_decoder(decoder) -> tuple[Callable[[str], bytes] | None, Callable[[bytes], bytes]]:
    """How a decoder makes bytes of a token's name, None if neighbours matter to it, and how it begins a text."""
    keep = bytes
    if decoder is None:
        return None, keep
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    strip_first = keep
    if kinds[-1] == "Strip" and "Fuse" in kinds and steps[-1]["stop"] == 0:
        content, most = steps[-1]["content"].encode(), steps[-1]["start"]
        strip_first = lambda text: _strip(text, content, most)  # noqa: E731
        steps, kinds = steps[:-1], kinds[:-1]
    if "Fuse" in kinds[:-1]:
        return None, keep
    changes = []
    for step, kind in zip(steps, kinds):
        if kind == "Replace" and "String" in step["pattern"]:
            changes.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            changes.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                strip_first = lambda text: text.lstrip(b" ")  # noqa: E731
        elif kind not in ("ByteFallback", "ByteLevel", "Fuse"):
            return None, keep
    has_bytes = "ByteFallback" in kinds

    def to_bytes(name: str) -> bytes:
        if has_bytes and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        for old, new in changes:
            name = name.replace(old, new)
        return name.encode()

    return (_from_byte_level if "ByteLevel" in kinds else to_bytes), strip_first


def _strip(text: bytes, content: bytes, most: int) -> bytes:
    for _ in range(most):
        text = text.removeprefix(content)
    return text


def _byte_level() -> dict[str, int]:
    """Byte-level BPE's characters: printable Latin-1 stands for itself, every other byte for one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level()


def _from_byte_level(name: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return name.encode()
