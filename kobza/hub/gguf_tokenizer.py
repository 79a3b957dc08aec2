"""The vocabulary in a .gguf's metadata -> the text of a tokenizer.json with the same ids.

A GGUF keeps the tokens, their kinds, and for byte-level BPE the merges and the NAME of the pattern that first parts a text
(`tokenizer.ggml.pre`); the pattern itself stands in llama.cpp. formats/splits.py has those that kobza reads; an unknown name is
refused, as another pattern would give other ids without a word. SentencePiece vocabularies (`llama`) come with scores instead of
merges: they are converted as spm.py does it. What kobza itself writes of characters and bytes (formats/gguf_tokens.py, and
`rwkv`) becomes such a tokenizer again.
"""

from __future__ import annotations

from typing import Any

from kobza.config import nearest, require
from kobza.formats.gguf_tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    characters_of_tokens,
    unescaped,
)
from kobza.formats.merges import merges
from kobza.formats.splits import BEGINS, COMPOSED, SPLITS, WHOLE, split
from kobza.hub.encodings import O200K_SPLIT
from kobza.hub.spm import decoder, normalized
from kobza.tokenizer import BYTE_LEVEL, ByteTokenizer, CharTokenizer, tokenizer_json

MOST = 2_000_000  # tokens, and merges

CASED = ("gpt-4o", "llama4", "kanana2")  # llama.cpp's pattern comes near the one these were trained with


def tokenizer_text(metadata: dict[str, Any]) -> str:
    """The text of the tokenizer.json that the metadata of a .gguf amount to."""
    kind = metadata.get("tokenizer.ggml.model")
    require(kind is not None, "the file has no vocabulary (tokenizer.ggml.model); give one with --tokenizer")
    readers = {"gpt2": _byte_level, "llama": _sentencepiece, "rwkv": _ascii}
    known = ", ".join(readers)
    require(kind in readers, f"tokenizer.ggml.model is {kind!r}; kobza reads {known}; give another with --tokenizer")
    tokens = _array(metadata, "tokens", str)
    kinds = _array(metadata, "token_type", int) if "tokenizer.ggml.token_type" in metadata else [NORMAL] * len(tokens)
    require(len(kinds) == len(tokens), f"{len(kinds):,} token types for {len(tokens):,} tokens: the file is damaged")
    require(len(set(tokens)) == len(tokens), f"the vocabulary has the token {_double(tokens)!r} twice; it is damaged")
    for key in ("bos", "eos"):
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(i, int) and "tokenizer.ggml.token_type" not in metadata and 0 <= i < len(tokens):
            kinds[i] = CONTROL
    n = len(tokens)
    while n and kinds[n - 1] == UNUSED and tokens[n - 1] == f"[PAD{n - 1}]":  # a row without a token
        n -= 1
    tokens, kinds = tokens[:n], kinds[:n]
    specials = {token: i for i, token in enumerate(tokens) if kinds[i] in (CONTROL, UNKNOWN)}
    own = {token: i for i, token in enumerate(tokens) if kinds[i] == USER_DEFINED}
    return readers[kind](metadata, tokens, kinds, specials, own)


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int], specials: dict[str, int], own: dict[str, int]
) -> str:
    """Byte-level BPE, as GPT-2's, or characters or bytes in its form."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    known = isinstance(pre, str) and pre in SPLITS
    hint = nearest(str(pre), sorted(SPLITS))
    require(known, f"tokenizer.ggml.pre is {pre!r}, a pattern that kobza does not know{hint}; give a --tokenizer")
    joined = _array(metadata, "merges", str)
    n = len(tokens) - len(specials)
    if list(specials.values()) == [*range(n, len(tokens))]:
        single = characters_of_tokens(tokens[:n], kinds[:n], joined)
        if single is not None:
            characters, spelled = single
            unknown = "bytes" if spelled else "error"
            bare = spelled and not characters
            return (ByteTokenizer([*specials]) if bare else CharTokenizer(characters, unknown, [*specials])).to_json()
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED or token != f"[PAD{i}]"}
    bad = next((pair for pair in joined if any(part not in vocab for part in _parts(pair))), None)
    require(bad is None, f"the merge {bad!r} joins what are no tokens: the file is damaged")
    model = {"type": "BPE", "vocab": vocab, "merges": joined, "ignore_merges": pre in WHOLE + CASED}
    steps = [split(pattern) for pattern in ((O200K_SPLIT,) if pre in CASED else SPLITS[pre])]
    around = {
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]},
        "decoder": BYTE_LEVEL,
        "post_processor": _edges(metadata, tokens, bos=pre in BEGINS),
    }
    return tokenizer_json(model, specials, own, **around)


def _parts(pair: str) -> list[str]:
    """What a merge joins, and what comes of it. _parts("a b") -> ["a", "b", "ab"]"""
    left, _, right = pair.partition(" ")
    return [left, right, left + right]


def _ascii(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int], specials: dict[str, int], own: dict[str, int]
) -> str:
    """ASCII characters, of those kinds that llama.cpp keeps as bytes; the big vocabularies of RWKV's models are not for us."""
    characters = [unescaped(token) for token in tokens]
    why = "tokenizer.ggml.model is 'rwkv' of more than single characters; give another with --tokenizer"
    require(all(characters), why)
    return CharTokenizer("".join(characters)).to_json()


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], kinds: list[int], specials: dict[str, int], own: dict[str, int]
) -> str:
    """SentencePiece's BPE: the higher its score, the sooner a token is joined."""
    scores = _array(metadata, "scores", float)
    same = len(scores) == len(tokens)
    require(same, f"{len(scores):,} scores for {len(tokens):,} tokens: the file is damaged; give a --tokenizer")
    joins = [i for i, kind in enumerate(kinds) if kind in (NORMAL, USER_DEFINED)]
    ranked = sorted(joins, key=lambda i: -scores[i])
    joined = merges([tokens[i] for i in ranked], {tokens[i] for i in joins})
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED or token != f"[PAD{i}]"}
    model = {"type": "BPE", "vocab": vocab, "merges": joined, "fuse_unk": True, "byte_fallback": BYTE in kinds}
    i = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    require(isinstance(i, int) and 0 <= i < len(tokens), f"unknown_token_id is {i!r} of {len(tokens):,} tokens")
    model["unk_token"] = tokens[i]
    # in SentencePiece's own numbers: 3 a space before the text, 4 superfluous spaces dropped, which a GGUF never asks for
    spec = {3: int(bool(metadata.get("tokenizer.ggml.add_space_prefix", True))), 4: 0}
    around = {"normalizer": normalized(spec), "decoder": decoder(spec)}
    return tokenizer_json(model, specials, own, **around, post_processor=_edges(metadata, tokens, bos=True))


def _edges(metadata: dict[str, Any], tokens: list[str], bos: bool) -> dict[str, Any] | None:
    """What stands before and after every text: bos and eos where the flags, or without them the kind, say so."""
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    names: dict[str, tuple[str, int]] = {}
    for edge in [edge for edge, on in wanted.items() if on]:
        i = metadata.get(f"tokenizer.ggml.{edge}_token_id")
        good = isinstance(i, int) and 0 <= i < len(tokens)
        require(good, f"add_{edge}_token is on and {edge}_token_id is {i!r} of {len(tokens):,} tokens")
        names[edge] = (tokens[int(i or 0)], int(i or 0))
    return edges(**names) if names else None


def edges(bos: tuple[str, int] | None = None, eos: tuple[str, int] | None = None) -> dict[str, Any]:
    """The post_processor of a tokenizer.json that puts (name, id) before and after a text."""
    a, b = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
    first, last = ([{"SpecialToken": {"id": edge[0], "type_id": 0}}] if edge else [] for edge in (bos, eos))
    table = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in filter(None, (bos, eos))}
    single = [*first, a, *last]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, b, *last], "special_tokens": table}


def _array(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    """An array of tokenizer.ggml, its elements of one kind."""
    values = metadata.get(f"tokenizer.ggml.{key}")
    require(values is not None, f"the vocabulary has no tokenizer.ggml.{key}; give another with --tokenizer")
    as_list = values.tolist() if callable(getattr(values, "tolist", None)) else values
    good = isinstance(as_list, list) and len(as_list) <= MOST
    require(good, f"tokenizer.ggml.{key} is no array of at most {MOST:,}: the file is damaged")
    kinds = (int, float) if kind is float else kind
    bad = next((value for value in as_list if not isinstance(value, kinds)), None)
    require(bad is None, f"tokenizer.ggml.{key} holds {bad!r}: the file is damaged")
    return as_list


def _double(tokens: list[str]) -> str:
    """The first token that stands twice."""
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            return token
        seen.add(token)
    return ""
