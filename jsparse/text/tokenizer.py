"""Text to token ids and back, through the checkpoint's own tokenizer files and chat template."""

import os
from collections.abc import Sequence
from pathlib import Path

from jsparse.errors import JsparseError

_FILES = ("tokenizer.json", "tokenizer.model")


class Tokenizer:
    """A transformers tokenizer, loaded from files alone: code that comes with a checkpoint is never run."""

    def __init__(self, backend):
        self._backend = backend

    @property
    def bos_id(self) -> int | None:
        return self._backend.bos_token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._backend)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the special tokens the checkpoint puts before a prompt."""
        try:
            return self._backend.encode(text, add_special_tokens=special_tokens)
        except TypeError as error:  # what the tokenizers library raises for lone surrogates
            raise JsparseError("the prompt or text has characters that are not valid Unicode") from error

    def encode_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation through the chat template, by default ready for the assistant's answer.

        Raises:
          JsparseError: there is no chat template, or a message lacks `role` or `content`.
        """
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise JsparseError(f"chat message {message!r} needs the keys 'role' and 'content'")
        if not self._backend.chat_template:
            raise JsparseError("this tokenizer has no chat template; write the prompt as text")
        try:
            text = self._backend.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may raise anything, and does for roles that it does not know
            raise JsparseError(f"the chat template refuses the messages: {error}") from error
        return self._backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into an existing directory."""
        self._backend.save_pretrained(str(directory))


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer whose files are in the directory, or None if there are none.

    Raises:
      JsparseError: the files cannot be read.
    """
    present = [name for name in _FILES if (Path(directory) / name).is_file()]
    if not present:
        return None
    # Without PyTorch transformers advises to install it; tokenizers need none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    kind = transformers.PreTrainedTokenizerFast if present[0] == "tokenizer.json" else transformers.LlamaTokenizer
    try:
        return Tokenizer(kind.from_pretrained(str(directory), local_files_only=True))
    except Exception as error:  # transformers raises whatever its parsers do
        raise JsparseError(f"{Path(directory) / present[0]}: the tokenizer cannot be read: {error}") from error
