"""SentencePiece `tokenizer.model` files as `tokenizers` pipelines.

The file itself says how texts are normalised and cut, and sentencepiece is right about that. For Llama's kind of file
(byte fallback, no normalisation) what happens behind special tokens is as in transformers 4.
"""

import unicodedata
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jsparse.errors import JsparseError

_SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_NEVER_MERGED = (_UNKNOWN, _CONTROL, _BYTE)


def is_sentencepiece(path: Path) -> bool:
    """Whether a file can be read as a SentencePiece model."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size() > 0
    except RuntimeError:
        return False


def read_sentencepiece(path: Path, add_prefix_space: bool | None = None, *, legacy: bool = True) -> Tokenizer:
    """The pipeline of a SentencePiece model.

    Args:
      path: of the file.
      add_prefix_space: put a space before a text; None does what the file says.
      legacy: put it also behind every special token inside a text.

    Raises:
      JsparseError: the model is neither BPE nor unigram, or treats spaces in a way that is not implemented.
    """
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    proto = SentencePieceExtractor(str(path)).proto
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix:
        raise JsparseError(f"{path}: SentencePiece models with spaces behind words are not implemented")
    if spec.remove_extra_whitespaces and any(piece.type == _USER_DEFINED for piece in proto.pieces):
        raise JsparseError(
            f"{path}: SentencePiece models that remove spaces around their own symbols are not implemented"
        )
    prefix = spec.add_dummy_prefix if add_prefix_space is None else add_prefix_space
    tokenizer = Tokenizer(_model(path, proto))
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    steps = _normalization(spec)
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix and legacy:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if prefix and not legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(_SPACE, " "), *([decoders.ByteFallback()] if trainer.byte_fallback else [])]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Fuse(), *strip])
    return tokenizer


def _model(path: Path, proto) -> models.Model:
    trainer = proto.trainer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == _UNIGRAM:
        # Texts that spell the name of a byte are no bytes: their pieces cost more than any way to spell them.
        lowest = 8 * min(score for _, score in scores)
        scores = [(piece.piece, lowest if piece.type == _BYTE else piece.score) for piece in proto.pieces]
        return models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != _BPE:
        raise JsparseError(f"{path}: SentencePiece models other than BPE and unigram are not implemented")
    from transformers.tokenization_utils_base import generate_merges

    vocabulary = {piece: number for number, (piece, _) in enumerate(scores)}
    never = {piece.piece for piece in proto.pieces if piece.type in _NEVER_MERGED}
    merges = generate_merges(vocabulary, dict(scores), skip_tokens=never)
    unknown, bytes_known = scores[trainer.unk_id][0], trainer.byte_fallback
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_known)


def _normalization(spec) -> list[normalizers.Normalizer]:
    """The file's own normalisation.

    `Precompiled` reads the rules, but of characters that belong together (a letter and its accent, a line's two end
    marks) it takes the rule of the first alone; what the named rules do to those is done before.
    """
    if not spec.precompiled_charsmap:
        return []
    steps = []
    if "nfkc" in spec.name:
        voiced = [chr(kana) + mark for kana in range(0xFF66, 0xFF9E) for mark in "\uff9e\uff9f"]
        composed = {pair: unicodedata.normalize("NFKC", pair) for pair in voiced}
        steps += [normalizers.NFC()]
        steps += [normalizers.Replace(pair, one) for pair, one in composed.items() if len(one) == 1]
    if spec.name.startswith("nmt"):
        steps.append(normalizers.Replace("\r\n", "\n\n"))
    return [*steps, normalizers.Precompiled(spec.precompiled_charsmap)]
