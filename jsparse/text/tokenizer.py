"""Text to token ids and back, through the checkpoint's own tokenizer files and chat template."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsparse.errors import JsparseError
from jsparse.text.detokenizer import Detokenizer, Vocabulary

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@contextlib.contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Say in a sentence what a library raises, panics of those in Rust too, which are no `Exception`."""
    try:
        yield
    except (JsparseError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise JsparseError(f"{doing}: {' '.join(str(error).split()) or type(error).__name__}") from error


class Tokenizer:
    """A transformers tokenizer over a `tokenizers.Tokenizer`; `jsparse.text.files` makes one of files."""

    def __init__(self, backend):
        self._backend = backend
        self._vocabulary: Vocabulary | None = None

    @property
    def bos_id(self) -> int | None:
        return self._backend.bos_token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._backend)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Ids of a text, with the special tokens the checkpoint puts before a prompt."""
        if _LONE_SURROGATE.search(text):
            raise JsparseError("the prompt or text has characters that are not valid Unicode")
        with library_errors("the tokenizer cannot encode the text"):
            return self._backend.encode(text, add_special_tokens=special_tokens, verbose=False)

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation through the chat template, by default ready for the assistant's answer.

        Args:
          messages: each has a `role` and a `content`, a string or a list of text parts; an assistant's message may have
            `tool_calls` instead.
          tools: JSON schemas, or Python functions with typed arguments and docstrings, that the assistant may call.
          add_generation_prompt: end with what introduces the assistant's answer.

        Raises:
          JsparseError: there is no chat template, it takes no tools, or it refuses the messages; or a message lacks
            what it needs.
        """
        conversation = [_read_message(message) for message in messages]
        if not self._backend.chat_template:
            raise JsparseError("this tokenizer has no chat template; write the prompt as text")
        with library_errors("the chat template refuses the messages"):  # a template may raise anything
            if tools and not _takes_tools(self._backend.get_chat_template(tools=tools)):
                raise JsparseError("this tokenizer's chat template takes no tools; describe them in a message")
            text = self._backend.apply_chat_template(
                conversation,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        return self.encode(text, special_tokens=False)

    def detokenizer(self, after: Iterable[int] = ()) -> Detokenizer:
        """Turns ids into text one by one, following the ids `after`."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._backend.backend_tokenizer)
        return Detokenizer(self._vocabulary, after)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out."""
        detokenizer = self.detokenizer()
        pieces = [detokenizer.step(int(token)) for token in ids]
        return "".join([piece.text for piece in pieces if not piece.is_special] + [detokenizer.end()])

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into an existing directory.

        transformers 4 and 5 and what is built on them read them as they are here: the class that they name builds
        nothing anew, and the chat template is in the file where all versions look for it.
        """
        directory = Path(directory)
        try:
            self._backend.save_pretrained(str(directory), save_jinja_files=False)
        except Exception as error:  # the tokenizers library's own, for a full disk too
            raise OSError(str(error)) from error
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in ("backend", "is_local", "local_files_only", "auto_map", "vocab", "merges", "vocab_file"):
            config.pop(key, None)
        if extra := config.pop("extra_special_tokens", None):
            config["additional_special_tokens"] = extra  # version 4 cannot read the other key's list
        before = self._backend.backend_tokenizer.pre_tokenizer
        state = {} if before is None else json.loads(before.__getstate__())
        config["add_prefix_space"] = state.get("add_prefix_space", False)  # version 4 follows it, not tokenizer.json
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _takes_tools(template: str) -> bool:
    """Whether a template looks at the tools."""
    return re.search(r"\btools\b", template) is not None


def _read_message(message: Any) -> dict[str, Any]:
    """A message as templates expect it: its content one string, the arguments of its tool calls objects.

    Raises: JsparseError: a key is missing or holds something else.
    """
    if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise JsparseError(f"chat message {message!r} needs the keys 'role' and 'content'")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list | tuple):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise JsparseError(f"chat message {message!r} has a part that is not text; only text can be read")
        content = "".join(part["text"] for part in content)
    if not isinstance(message["role"], str) or not isinstance(content, str if not calls else str | None):
        raise JsparseError(f"chat message {message!r} needs strings under 'role' and 'content'")
    if not calls:
        return {**message, "content": content}
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise JsparseError(f"chat message {message!r} has 'tool_calls' that are not a list of objects")
    return {**message, "content": content, "tool_calls": [_read_call(call) for call in calls]}


def _read_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object: OpenAI's format spells them as JSON, and templates would again."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise JsparseError(f"the arguments of tool call {call!r} are not JSON: {error}") from None
    return {**call, "function": {**function, "arguments": arguments}}
