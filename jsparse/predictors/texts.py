"""Calibration texts: the shipped model's own, and those of files."""

import codecs
import json
from pathlib import Path
from typing import Any

from jsparse.checkpoints.open import DEFAULT_MODEL
from jsparse.directories import check_pointer
from jsparse.errors import JsparseError, listing


def read_prompts(path: Path) -> list[Any]:
    """Calibration texts of a .txt file (one text) or a .jsonl file (a `text` or a chat in `messages` per line).

    Raises:
      JsparseError: the file cannot be read, or a line is not one of these; all such lines are listed.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise JsparseError(f"{path}: calibration prompts come as .txt or .jsonl")
    content = read_text(path)
    if path.suffix == ".txt":
        return [content]
    texts, problems = [], []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            problems.append(f"line {number} is not JSON")
            continue
        if isinstance(entry, dict) and entry.get("text") == "" and "messages" not in entry:
            continue  # as exports of WikiText have them between paragraphs
        text = (entry.get("text") or entry.get("messages")) if isinstance(entry, dict) else None
        if isinstance(text, str) or (
            isinstance(text, list) and text and all(isinstance(message, dict) for message in text)
        ):
            texts.append(text)
        else:
            problems.append(f"line {number} has neither a 'text' string nor a 'messages' list")
    if problems:
        raise JsparseError(f"{path}: {listing(problems, most=5, between='; ')}")
    return texts


def read_text(path: Path) -> str:
    """A UTF-8 text file without the byte order mark that some editors put before it.

    Raises:
      JsparseError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JsparseError(f"{path}: {error.strerror}") from error
    check_pointer(path, content)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise JsparseError(f"{path}: is UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise JsparseError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def default_texts(model: str) -> list[str]:
    """The calibration text shipped with the default model.

    Raises: JsparseError: another model was asked for.
    """
    if model != "default":
        raise JsparseError(
            f"{model} comes without calibration text, which only the shipped model, asked for as 'default', has: give "
            "text like what the model will be used on (--prompts FILE)"
        )
    return [(DEFAULT_MODEL / "calibration.txt").read_text(encoding="utf-8")]
