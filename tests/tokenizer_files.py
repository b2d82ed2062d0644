"""Tokenizers as checkpoints ship them, and tiny checkpoints that say what they are told to."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from texts import TEXTS
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jsparse.text.tokenizer import Tokenizer as JsparseTokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


def byte_level(prefix_space: bool = False) -> Tokenizer:
    """256 bytes and ChatML's special tokens, as Qwen2's tokenizer.json without its merges."""
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([special(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer


def byte_tokenizer(template: str | None = None) -> JsparseTokenizer:
    """One token per byte, id 256 the end of text."""
    core = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(ALPHABET)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    backend = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    backend.chat_template = template
    return JsparseTokenizer(backend)


def byte_fallback(bos: bool = True) -> Tokenizer:
    """Printable ASCII and byte tokens, as Llama 2's tokenizer.json without its merges; ids 3 to 258 are the bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in ["\u2581", *map(chr, range(33, 127))]:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([special(name) for name in ("<unk>", "<s>", "</s>")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def write_tokenizer(directory: Path, tokenizer: Tokenizer | None, config: dict | None = None, **files: Any) -> Path:
    """Write tokenizer.json, tokenizer_config.json and other files, whose names have __ for the dot."""
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return directory


def train_sentencepiece(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Train a model of Llama's kind on the shared texts, but for the options, and write it."""
    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(text for text in TEXTS if text.isprintable() and text.strip()) * 8, encoding="utf-8")
    settings = {
        "vocab_size": 1000,
        "model_type": "bpe",
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
        "minloglevel": 5,
    }
    prefix = path.with_suffix("")
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(prefix), **settings | options)
    prefix.with_suffix(".model").rename(path)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def write_scripted(directory: Path, tokens: list[int], vocabulary: int, **config: Any) -> Path:
    """Write a Llama checkpoint whose greedy choice after tokens[i] is tokens[i + 1]: ids of one script, all different.

    The embedding is one-hot, the layer adds nothing, and the head moves every token to its successor.
    """
    width = -(-vocabulary // 8) * 8
    fields = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": vocabulary,
        "hidden_act": "relu",
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    } | config
    assert len(set(tokens)) == len(tokens)
    zeros = {"q": width, "k": width, "v": width, "o": width}
    arrays = {f"model.layers.0.self_attn.{name}_proj.weight": np.zeros((width, width)) for name in zeros}
    arrays |= {f"model.layers.0.mlp.{name}_proj.weight": np.zeros((8, width)) for name in ("gate", "up")}
    arrays["model.layers.0.mlp.down_proj.weight"] = np.zeros((width, 8))
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    arrays |= {f"{name}.weight": np.ones(width) for name in norms}
    arrays["model.embed_tokens.weight"] = np.eye(vocabulary, width)
    head = np.zeros((vocabulary, width))
    head[tokens[1:], tokens[:-1]] = 1
    arrays["lm_head.weight"] = head
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file({name: array.astype(np.float32) for name, array in arrays.items()}, directory / "model.safetensors")
    return directory
