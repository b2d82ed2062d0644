"""Tokenizer files that packages on PyPI ship; `make test` puts them beside the environment's own packages."""

import json
import sys
from pathlib import Path

SENTENCEPIECE = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
)
TEKKEN = "tekken_240911.json"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Names of the special tokens of files that leave them out; what follows is <SPECIAL_20> and so on."""


def packaged(package: str, name: str) -> Path:
    """Where `make test` puts a file of a package."""
    folder = Path(sys.prefix) / "tokenizers" / package
    return folder / "data" / name if package == "mistral_common" else folder / name


def write_tekken(source: Path, directory: Path) -> Path:
    """Write a tekken.json that names its special tokens, as newer ones do."""
    content = json.loads(source.read_text(encoding="utf-8"))
    content["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(_TEKKEN_SPECIAL)
    ]
    directory.mkdir(parents=True)
    (directory / "tekken.json").write_text(json.dumps(content), encoding="utf-8")
    return directory
