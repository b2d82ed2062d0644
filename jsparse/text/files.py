"""A checkpoint's tokenizer from its files alone: code that comes with a checkpoint is never run.

What counts is what the checkpoint's authors ran, which for most was transformers 4. Where transformers 5 reads the same
files in another way, this follows version 4; docs/tokenizers.md lists the differences.
"""

import inspect
import json
import logging
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from jsparse.directories import check_readable, read_json
from jsparse.errors import JsparseError
from jsparse.text.sentencepiece_model import is_sentencepiece, read_sentencepiece
from jsparse.text.tokenizer import Tokenizer, library_errors

_ADDS_BOS = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}
"""Classes of transformers 4 whose `add_bos_token` and `add_eos_token` decide, whatever tokenizer.json says, and whether
they add a BOS token by default. None adds an EOS token by default."""
_LLAMA = ("LlamaTokenizer", "CodeLlamaTokenizer")
_CLASSES = {"qwen2": "Qwen2Tokenizer"}
"""Tokenizer class by model type where no file declares one; every other family's is Llama's."""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_OTHERS = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken")


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer whose files are in the directory, or None if there are none.

    Raises:
      JsparseError: the files cannot be read, or are of a kind that is not implemented.
    """
    directory = Path(directory)
    names = ("tokenizer.json", "tokenizer.model", "tekken.json", *_OTHERS)
    present = [directory / name for name in names if os.path.lexists(directory / name)]
    if not present:
        return None
    # Without PyTorch transformers advises to install it; tokenizers need none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    beside = [directory / name for name in _BESIDE if os.path.lexists(directory / name)]
    for path in (*present, *beside, *directory.glob("additional_chat_templates/*.jinja")):
        check_readable(path)
    config = _read_config(directory)
    declared = _declared_class(directory, config)
    log = logging.getLogger("transformers")
    before, log.disabled = log.disabled, True  # its advice is for callers of transformers
    try:
        with library_errors(f"{present[0]}: the tokenizer cannot be read"):
            return Tokenizer(_load(present, declared, config))
    finally:
        log.disabled = before


def _read_config(directory: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, and the older files beside it where it does not describe its added tokens."""
    config = _optional_json(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return config | _optional_json(directory / "special_tokens_map.json")


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def _declared_class(directory: Path, config: dict[str, Any]) -> str:
    """The class that the checkpoint names, without "Fast", or the one of its model type."""
    model = _optional_json(directory / "config.json")
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    return str(name or _CLASSES.get(str(model.get("model_type")), "LlamaTokenizer")).removesuffix("Fast")


def _load(present: list[Path], declared: str, config: dict[str, Any]):
    """A transformers tokenizer over the pipeline of the first file that is there, with the checkpoint's own names."""
    import transformers

    class FileTokenizer(transformers.PreTrainedTokenizerFast):
        """Takes the pipeline as it is: transformers 5 would change what it adds before and after a text."""

        vocab_files_names = {}  # noqa: RUF012

        @classmethod
        def convert_to_native_format(cls, **options):
            return options if "tokenizer_object" in options else super().convert_to_native_format(**options)

        def update_post_processor(self):
            pass

    directory = present[0].parent
    made = _pipeline(present, declared, config)
    options: dict[str, Any] = {} if made is None else {"tokenizer_object": made}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(extra := config.get(key), list):
            options[key] = [_token(entry) for entry in extra]
    tokenizer = FileTokenizer.from_pretrained(str(directory), local_files_only=True, **options)
    template = tokenizer.chat_template or _optional_json(directory / "chat_template.json").get("chat_template")
    tokenizer.chat_template = template.removeprefix("\ufeff") if isinstance(template, str) else template
    if made is None and declared not in (*_LLAMA, "TokenizersBackend"):  # under the last name version 5 writes
        _set_prefix_space(tokenizer.backend_tokenizer, bool(config.get("add_prefix_space")))
    _name_tokens(tokenizer, declared, config)
    add_bos, add_eos = config.get("add_bos_token", _ADDS_BOS.get(declared)), config.get("add_eos_token", False)
    if declared in _ADDS_BOS:
        _set_post_processor(tokenizer, add_bos, add_eos)
    elif present[0].name == "vocab.json" and declared in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        _set_post_processor(tokenizer, add_bos and declared == "GPT2Tokenizer", False)
    return tokenizer


def _pipeline(present: list[Path], declared: str, config: dict[str, Any]) -> Backend | None:
    """The pipeline of the files that are there, or None for tokenizer.json, which transformers reads itself."""
    files = {path.name: path for path in present}
    # Version 4 builds a Llama tokenizer anew where its config says anything about the space before a text.
    anew = declared == "LlamaTokenizer" and config.get("add_prefix_space") is not None
    if "tokenizer.model" in files and (anew or "tokenizer.json" not in files):
        return _read_model(files["tokenizer.model"], config)
    if "tokenizer.json" in files:
        return None
    if "tekken.json" in files:
        return _read_tekken(files["tekken.json"])
    return _read_by_class(present[0].parent, list(files), declared)


def _name_tokens(tokenizer, declared: str, config: dict[str, Any]) -> None:
    """Give special tokens that the checkpoint does not name the names of its class, where those are tokens at all."""
    backend = tokenizer.backend_tokenizer
    for key, token in _default_tokens(declared).items():
        if key not in config and getattr(tokenizer, key) is None and backend.token_to_id(token) is not None:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            setattr(tokenizer, key, token)


def _token(entry: Any) -> str | AddedToken:
    """A special token as files spell it, by its name or as an object, which transformers 5 refuses in lists."""
    if not isinstance(entry, dict):
        return entry
    fields = {key: entry[key] for key in ("content", "single_word", "lstrip", "rstrip", "normalized") if key in entry}
    return AddedToken(**fields, special=True)


def _read_model(path: Path, config: dict[str, Any]) -> Backend:
    if is_sentencepiece(path):
        return read_sentencepiece(path, config.get("add_prefix_space"), legacy=config.get("legacy") is not False)
    from transformers.convert_slow_tokenizer import TikTokenConverter

    try:
        import tiktoken  # noqa: F401
    except ImportError:
        raise JsparseError(
            f"{path} is neither a SentencePiece model nor, as far as can be told without tiktoken, one of tiktoken's; "
            "if it is, pip install tiktoken, or add the tokenizer.json of the same model"
        ) from None
    added = {int(token): entry["content"] for token, entry in config.get("added_tokens_decoder", {}).items()}
    size = len(TikTokenConverter.load_tiktoken_bpe(str(path)))
    extra = [added.get(token, f"<|reserved_token_{token}|>") for token in range(size, max(added, default=0) + 1)]
    return TikTokenConverter(vocab_file=str(path), extra_special_tokens=extra).converted()


def _read_tekken(path: Path) -> Backend:
    try:
        from transformers.integrations.mistral.tokenizer import MistralConverter

        return MistralConverter(str(path)).converted()
    except ImportError:  # the names of special tokens that older files leave out
        raise JsparseError(
            f"{path} cannot be read without the package mistral-common: install it, or put the tokenizer.json of the "
            "same model beside it"
        ) from None


def _read_by_class(directory: Path, names: list[str], declared: str) -> Backend:
    """The pipeline that the declared class of transformers builds from vocab.json and merges.txt, or other files."""
    import transformers

    kind = getattr(transformers, declared, None)
    wanted = dict(getattr(kind, "vocab_files_names", {}))
    wanted.pop("tokenizer_file", None)
    if not wanted or not set(wanted.values()) <= set(names):
        raise JsparseError(
            f"{directory}: {', '.join(names)} cannot be read as a {declared}; name the class that wrote them under "
            "tokenizer_class in tokenizer_config.json (GPT2Tokenizer, Qwen2Tokenizer), or add tokenizer.json"
        )
    return kind.from_pretrained(str(directory), local_files_only=True).backend_tokenizer


def _default_tokens(declared: str) -> dict[str, str]:
    """The special tokens of a class for names that a checkpoint leaves out."""
    import transformers

    kind = getattr(transformers, declared, None)
    if kind is None:
        return {}
    parameters = inspect.signature(kind.__init__).parameters
    found = {key: parameters[key].default for key in _NAMED if key in parameters}
    return {key: str(token) for key, token in found.items() if isinstance(token, str | AddedToken)}


def _set_prefix_space(backend: Backend, wanted: bool) -> None:
    """Let the config decide on the space before a text, over what a byte-level tokenizer.json says: version 4 does."""
    if backend.pre_tokenizer is None:
        return
    state = json.loads(backend.pre_tokenizer.__getstate__())
    if state["type"] == "ByteLevel" and state["add_prefix_space"] != wanted:
        del state["type"]
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(**state | {"add_prefix_space": wanted})


def _set_post_processor(tokenizer, add_bos: bool, add_eos: bool) -> None:
    """Put the BOS token before a text and the EOS token behind it, as the flags say."""
    backend = tokenizer.backend_tokenizer
    before = [tokenizer.bos_token] if add_bos and tokenizer.bos_token else []
    after = [tokenizer.eos_token] if add_eos and tokenizer.eos_token else []
    known = {token: backend.token_to_id(token) for token in before + after}
    single = [*before, "$A", *after]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*known.items()])
