"""Ids to text, one token at a time, and the stop texts and chats around them."""

import dataclasses

import pytest
import transformers
from texts import TEXTS
from tokenizer_files import LLAMA, byte_fallback, byte_level, special, write_scripted, write_tokenizer
from tokenizers import Tokenizer, decoders, models

import jsparse
from jsparse.cli.main import main as command_line
from jsparse.text.completion import TextCompletion
from jsparse.text.files import load_tokenizer
from jsparse.text.tokenizer import Tokenizer as TextTokenizer

CHATML = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}


def wrap(tokenizer: Tokenizer, **options) -> TextTokenizer:
    return TextTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options))


def complete(tokenizer: TextTokenizer, ids: list[int], size: int, stops: tuple[str, ...] = (), prompt: str = "A"):
    """The text of the ids as it comes in groups of `size`, and all of it."""
    completion = TextCompletion(tokenizer, tokenizer.encode(prompt), stops)
    pieces = []
    for start in range(0, len(ids), size):
        pieces.append(completion.extend(ids[start : start + size], last=start + size >= len(ids)))
        if completion.ended:
            break
    assert "".join(pieces) == completion.value()
    return completion


def byte_ids(text: str | bytes) -> list[int]:
    return [3 + byte for byte in (text.encode() if isinstance(text, str) else text)]


CUT = {
    "a character cut at the end": (byte_ids("é日") + byte_ids("€".encode()[:1]), "é日\ufffd"),
    "two of three bytes": (byte_ids("é日") + byte_ids("€".encode()[:2]), "é日\ufffd"),
    "a byte that begins nothing between characters": (
        byte_ids("é\N{SNOWMAN}".encode() + b"\xff" + "日".encode()),
        "é☃\ufffd日",
    ),
    "a cut character before another token": ([*byte_ids(b"\xe2\x82"), 259 + 33], "\ufffdA"),
    "a special token between the bytes": ([*byte_ids(b"\xe2"), 1, *byte_ids(b"\x82\xac")], "€"),
    "nothing cut": (byte_ids("🌶€"), "🌶€"),
}


@pytest.mark.parametrize("size", [1, 2, 3, 32])
@pytest.mark.parametrize("name", CUT)
def test_no_complete_character_is_lost(name, size):
    ids, text = CUT[name]
    tokenizer = wrap(byte_fallback())
    assert complete(tokenizer, ids, size).value() == text
    assert tokenizer.decode([*tokenizer.encode("A"), *ids]) == f"A{text}"
    assert tokenizer.decode([*tokenizer.encode("A"), *ids]).startswith("A")


def test_a_character_comes_with_its_last_byte():
    tokenizer = wrap(byte_fallback())
    completion = TextCompletion(tokenizer, tokenizer.encode("A"), ["never"])
    pieces = [completion.extend([token], last=False) for token in byte_ids("é🌶x")]
    assert pieces == ["", "é", "", "", "", "🌶", "x"]


def test_a_prompt_that_ends_inside_a_character():
    tokenizer = wrap(byte_fallback())
    completion = TextCompletion(tokenizer, [1, *byte_ids("a🌶".encode()[:3])], [])
    assert completion.extend(byte_ids("🌶".encode()[2:]), last=True) == "🌶"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_decoding_is_that_of_transformers(make):
    tokenizer = wrap(make())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        expected = tokenizer._backend.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if "\ufffd" not in expected:
            assert tokenizer.decode(ids) == expected


DECODERS = {
    "Metaspace": decoders.Metaspace(),
    "WordPiece": decoders.WordPiece(),
    "BPE suffix": decoders.BPEDecoder(suffix="</w>"),
    "none": None,
    "Replace alone": decoders.Replace("\u2581", " "),
    "Strip at the end": decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)]
    ),
    "Replace behind Fuse": decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_other_kinds(name):
    words = ["\u2581he", "llo", "\u2581", "##ly", "world</w>", "a", "b", "!"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    if DECODERS[name] is not None:
        backend.decoder = DECODERS[name]
    for ids in ([0, 1, 2, 3], [1, 0, 3, 4, 7], [5, 6, 5], [2, 2, 5]):
        if name in ("Replace behind Fuse", "Strip at the end") and ids in ([5, 6, 5], [0, 1, 2, 3], [2, 2, 5]):
            continue  # what a later token changes of an earlier one cannot be streamed
        assert wrap(backend).decode(ids) == backend.decode(ids)


def test_ids_beyond_the_vocabulary_add_nothing():
    assert wrap(byte_level()).decode([64, 5000, 65]) == "ab"


def test_added_tokens_are_text_as_they_stand():
    backend = byte_level()
    backend.add_tokens(["<é think>"])
    assert wrap(backend).decode([64, 259, 65]) == "a<é think>b"


def test_each_token_is_decoded_once_and_certain_text_is_let_go():
    tokenizer = wrap(byte_fallback())
    completion = TextCompletion(tokenizer, tokenizer.encode("A"), ["the end"])
    steps = []
    step = completion._detokenizer.step
    completion._detokenizer.step = lambda token: (steps.append(token), step(token))[1]
    ids = byte_ids("日本the é" * 300)
    for start in range(0, len(ids), 4):
        completion.extend(ids[start : start + 4], last=False)
        assert len(completion._tail) < len("the end")
    assert steps == ids


STOPS = {
    "a special token": (("<|im_end|>",), " ok!"),
    "text before a special token": (("ok!<|im_end|>",), " "),
    "a special token and what follows": (("<|im_end|>\nB",), " ok!"),
    "inside a special token's name": (("im_end",), " ok!"),
    "the first of two": (("Bcd", "<|im_end|>"), " ok!"),
    "a text that never comes": (("<|im_start|>",), " ok!\nBcdef"),
    "the beginning of one at the end": (("defg",), " ok!\nBcdef"),
}


@pytest.mark.parametrize("size", [1, 3, 32])
@pytest.mark.parametrize("name", STOPS)
def test_stop_texts_see_special_tokens(name, size):
    stops, text = STOPS[name]
    backend = byte_level()
    completion = complete(wrap(backend), backend.encode(" ok!<|im_end|>\nBcdef").ids, size, stops)
    assert completion.value() == text
    assert completion.ended == (text != " ok!\nBcdef")


def test_stop_texts_through_the_api_as_transformers_stops(tmp_path, capsys):
    backend = byte_level()
    script = backend.encode("A ok!<|im_end|>\nBcdef").ids
    directory = write_tokenizer(write_scripted(tmp_path / "m", script, 264, eos_token_id=256), backend, CHATML)
    params = jsparse.load(directory)
    options = {"max_new_tokens": 10, "stop": "<|im_end|>"}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = auto("A", return_tensors="pt")
    right = model.generate(**inputs, max_new_tokens=10, stop_strings=["<|im_end|>"], tokenizer=auto, do_sample=False)
    right = auto.decode(right[0, 1:], skip_special_tokens=True)
    assert right == " ok!"
    assert jsparse.generate(params, "A", **options) == right
    assert "".join(jsparse.generate(params, "A", stream=True, **options)) == right
    command_line(["generate", str(directory), "A", "--max-new-tokens", "10", "--stop", "<|im_end|>"])
    assert capsys.readouterr().out.strip("\n") == right


def test_cut_characters_through_the_api(tmp_path):
    backend = byte_fallback()
    script = [259 + 33, *byte_ids("é日"), *byte_ids(b"\xe2")]
    directory = write_tokenizer(write_scripted(tmp_path / "m", script, 360, eos_token_id=2), backend, LLAMA)
    params = jsparse.load(directory)
    assert jsparse.generate(params, "A", max_new_tokens=6) == "é日\ufffd"
    assert "".join(jsparse.generate(params, "A", max_new_tokens=6, stream=True)) == "é日\ufffd"
    assert jsparse.generate(params, "A", max_new_tokens=6, stop="日") == "é"


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
SHOW = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}]{% endfor %}"
)


def ask(tokenizer: TextTokenizer, messages: list, **options) -> str:
    return tokenizer.decode(tokenizer.encode_chat(messages, **options))


def test_tool_calls_without_content():
    tokenizer = wrap(byte_level(), chat_template=SHOW)
    user = {"role": "user", "content": "1 + 1?"}
    for message in (
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ):
        assert ask(tokenizer, [user, message]).endswith('add{"a": 1}]')
    as_object = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}
    assert ask(tokenizer, [user, {"role": "assistant", "content": None, "tool_calls": [as_object]}]).endswith(
        'add{"a": 1}]'
    )


def test_content_in_parts():
    tokenizer = wrap(byte_level(), chat_template=SHOW)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert ask(tokenizer, [{"role": "user", "content": parts}]) == "[user:a b]"


def test_tools():
    taking = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + SHOW
    messages = [{"role": "user", "content": "a"}]

    def add(a: int):
        """
        Add.

        Args:
            a: A number.
        """

    assert ask(wrap(byte_level(), chat_template=taking), messages, tools=[add]) == "add[user:a]"
    with pytest.raises(jsparse.JsparseError, match="chat template takes no tools"):
        wrap(byte_level(), chat_template=SHOW).encode_chat(messages, tools=[add])
    named = {"default": SHOW, "tool_use": taking}
    assert ask(wrap(byte_level(), chat_template=named), messages, tools=[add]) == "add[user:a]"
    assert ask(wrap(byte_level(), chat_template=named), messages) == "[user:a]"


TEMPLATES = {
    "the date": ("{{ strftime_now('%Y') | length }}", "4"),
    "the tag generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "hi",
    ),
    "a loop that is left": ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "hi"),
    "JSON as it is written": ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_ask_for(name):
    template, text = TEMPLATES[name]
    assert ask(wrap(byte_level(), chat_template=template), [{"role": "user", "content": "hi"}]) == text


def test_named_templates_without_a_default():
    tokenizer = wrap(byte_level(), chat_template={"rag": SHOW, "tool_use": SHOW})
    with pytest.raises(jsparse.JsparseError, match="no default"):
        ask(tokenizer, [{"role": "user", "content": "hi"}])


BAD_MESSAGES = {
    "no content": ({"role": "assistant"}, "needs the keys"),
    "content that is a number": ({"role": "user", "content": 3}, "needs strings"),
    "no content and no calls": ({"role": "assistant", "content": None, "tool_calls": []}, "needs strings"),
    "a picture": ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "not text"),
    "calls that are a string": ({"role": "assistant", "tool_calls": "add"}, "list of objects"),
    "arguments that are no JSON": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]},
        "not JSON",
    ),
    "a lone surrogate": ({"role": "user", "content": "a\udcff"}, "not valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_messages_that_are_none(name):
    message, said = BAD_MESSAGES[name]
    with pytest.raises(jsparse.JsparseError, match=said):
        wrap(byte_level(), chat_template=SHOW).encode_chat([message])


def test_tools_through_generate(tmp_path):
    backend = byte_level()
    script = backend.encode("?yes").ids
    directory = write_tokenizer(write_scripted(tmp_path / "m", script, 264), backend, CHATML)
    params = jsparse.load(directory)
    template = "{{ tools[0].function.name if tools else 'none' }}?"
    tokenizer = wrap(byte_level(), chat_template=template)
    params = dataclasses.replace(params, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "a"}]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert jsparse.generate(params, chat, tools=[tool], max_new_tokens=3) == "yes"


def test_special_tokens_are_not_part_of_a_text():
    backend = byte_level()
    backend.add_special_tokens([special("<think>")])
    tokenizer = wrap(backend)
    assert tokenizer.decode(backend.encode("a<think>b<|im_end|>").ids) == "ab"


def test_a_tokenizer_that_is_there_but_not_read(tmp_path):
    directory = write_tokenizer(tmp_path / "m", None, {"tokenizer_class": "LlamaTokenizer"}, vocab__json={"a": 0})
    with pytest.raises(jsparse.JsparseError, match=r"vocab\.json cannot be read as a LlamaTokenizer"):
        load_tokenizer(directory)
