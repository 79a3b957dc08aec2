"""A SentencePiece .model as a tokenizer of the `tokenizers` library with the same ids, or a refusal that says why not.

The `sentencepiece` library (extra "sentencepiece") reads the file and tells its pieces; how a text is normalized stands only in
the file's header, which `fields` reads. Both kinds of model convert: BPE, whose scores are ranks (merges.py), and Unigram. What
SentencePiece does to spaces becomes a few replacements. Every conversion is compared with SentencePiece itself on hard texts.

A model with a normalization table (nmt_nfkc, the default, or nfkc) gets the ids that Hugging Face's own conversions give: they
differ from SentencePiece's where a mark or joiner follows another mark or a character that the table changes.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kobza.config import InputError, require
from kobza.formats.merges import merges
from kobza.tokenizer import LibraryTokenizer, tokenizer_json

SPACE = "▁"  # U+2581, SentencePiece's stand-in for a space
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # of models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
CHECKS = (
    *("", " ", "a", " a", "a b", "  a   b ", "\n", "a\nb\n\n c\t", "a\r\nb", "ab" * 20, "а" * 17, "їжак ґанок і ще й"),
    *(
        "日本語中文한국어",
        "👩\u200d👩\u200d👧 🇺🇦👍🏽",
        "x = [1, 23, 456]; y_1 != 7e-8",
        "<s> </s> <unk> <0x41>",
        "\u00a0\u3000x \u2028",
    ),
    *("e\u0301", "Ａﬁ½", "\x00\x7f", "\ue000\U0010fffd z"),
)


def from_model(path: Path) -> LibraryTokenizer:
    """The tokenizer of a SentencePiece .model file."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise InputError(f'{path}: SentencePiece is not installed; pip install "kobza[sentencepiece]"') from None
    try:
        data = path.read_bytes()
        require(bool(data), "the file is empty; fetch it again")  # of which the library complains on stderr by itself
        processor = SentencePieceProcessor(model_proto=data)
        tokenizer = LibraryTokenizer(converted(processor, types(data), *header(data)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
        raise InputError(f"{path}: not a SentencePiece model, or a damaged one; fetch it again") from None
    own = [piece for piece, kind in zip(_pieces(processor), types(data), strict=True) if kind == USER_DEFINED][:20]
    for check in (*CHECKS, *(f"{piece}a{piece}{piece} b {piece}" for piece in own)):
        same = tokenizer.encode(check).tolist() == processor.encode(check)
        remedy = "take a tokenizer.json of this model, or train with tokenizer=bpe"
        require(same, f"{path}: cannot be converted exactly: {check!r} would get other ids; {remedy}")
    return tokenizer


def converted(processor: Any, kinds: list[int], trainer: dict[int, Any], normalizer: dict[int, Any]) -> str:
    """The text of the tokenizer.json that a model, the kinds of its pieces and the settings in its header, amount to."""
    kind = KINDS.get(trainer.get(3, 1), "unknown")
    require(kind in ("unigram", "bpe"), f"a SentencePiece model of kind {kind}; kobza converts unigram and bpe")
    require(not trainer.get(24), "treat_whitespace_as_suffix is on, which cannot be converted exactly")
    require(normalizer.get(5, 1), "escape_whitespaces is off, which cannot be converted exactly")
    require(UNUSED not in kinds, "the model has unused pieces, which cannot be converted exactly")
    names, fallback, unknown = _pieces(processor), BYTE in kinds, processor.unk_id()
    own = {name: i for i, name in enumerate(names) if kinds[i] == USER_DEFINED}
    specials = {name: i for i, name in enumerate(names) if kinds[i] in (UNKNOWN, CONTROL)}
    normal = [i for i in range(len(names)) if kinds[i] == NORMAL]
    if kind == "bpe":
        ranked = sorted(normal, key=lambda i: -processor.get_score(i))
        joined = merges([names[i] for i in ranked], {names[i] for i in normal})
        model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": joined, "fuse_unk": True}
        model |= {"unk_token": names[unknown], "byte_fallback": fallback}
    else:
        vocab = [[name, processor.get_score(i)] for i, name in enumerate(names)]
        model = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": fallback}
    # a space only begins pieces: parting there changes nothing, and the library is quicker with short words
    split = {"type": "Split", "pattern": {"String": SPACE}, "behavior": "MergedWithNext", "invert": False}
    parts = None if any(SPACE in names[i][1:] for i in normal) else split
    around = {"normalizer": normalized(normalizer), "pre_tokenizer": parts, "decoder": decoder(normalizer)}
    return tokenizer_json(model, specials, own, **around)


def normalized(spec: dict[int, Any]) -> dict[str, Any]:
    """What SentencePiece does to a text before it parts it: the table; 4: superfluous spaces dropped; 3: one put before."""
    steps: list[dict[str, Any]] = []
    if spec.get(2):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec[2]).decode()})
    if spec.get(4, 1):
        steps.append({"type": "Replace", "pattern": {"Regex": rf"\A +|[ {SPACE}]+\z|(?<= ) +"}, "content": ""})
    if spec.get(3, 1):
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def decoder(spec: dict[int, Any]) -> dict[str, Any]:
    """The way back; the space put before a text goes again."""
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.get(3, 1):
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _pieces(processor: Any) -> list[str]:
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


# ---- the header ----------------------------------------------------------------------------------------------------


def header(data: bytes) -> tuple[dict[int, Any], dict[int, Any]]:
    """TrainerSpec and NormalizerSpec of a model, {number of the field: value}; what is absent has its default."""
    # the library's own reader of them needs a protobuf of one exact version
    parts = dict(fields(data))
    return dict(fields(parts.get(2, b""))), dict(fields(parts.get(3, b"")))


def types(data: bytes) -> list[int]:
    """The kind of each piece of a model, of which the library tells only some."""
    return [dict(fields(value)).get(3, NORMAL) for number, value in fields(data) if number == 1]


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: whole numbers, or bytes. fields(b"\\x18\\x02") -> (3, 2)"""
    i = 0
    while i < len(data):
        key, i = varint(data, i)
        if key & 7 == 0:
            value, i = varint(data, i)
            yield key >> 3, value
            continue
        size, i = varint(data, i) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], i)
        yield key >> 3, data[i : i + size]
        i += size


def varint(data: bytes, i: int) -> tuple[int, int]:
    """A number of 7-bit groups, lowest first, from place i -> (number, place after it)."""
    number = shift = 0
    while True:
        byte, i = data[i], i + 1
        number, shift = number | (byte & 127) << shift, shift + 7
        if byte < 128:
            return number, i
