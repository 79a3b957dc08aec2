"""BLOCK 1: text <-> ids. Characters, and byte-level BPE trained on the text; one interface, one file `tokenizer.json`.

Every token has its bytes (`pieces`), so decoding, bits per byte and streaming are the same few lines for both. The file is
the `tokenizers` library's own format: that library, and what builds on it, loads ours.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import DataConfig, InputError, require

EOT = "<|endoftext|>"  # parts documents; GPT-2's name
BOS = "<|begin|>"


class Tokenizer:
    """What the two kinds share. `pieces[i]` are the bytes of token i; a special token has none."""

    def __init__(self, pieces: list[bytes], specials: dict[str, int]):
        self.pieces, self.specials = pieces, specials
        self.vocab_size = len(pieces)
        self.eot_id, self.bos_id = specials.get(EOT), specials.get(BOS)
        self.ends = [] if self.eot_id is None else [self.eot_id]  # the ids that end a text
        self.piece_bytes = np.array([len(piece) for piece in pieces], dtype=np.int64)

    def encode(self, text: str, line: int = 1) -> np.ndarray:
        """Ids (n,) int32 of a text; special tokens are never read out of it. `line` is the number of its first line."""
        raise NotImplementedError

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def line_start(self) -> str:
        """A prompt that says nothing: a line end, or where the vocabulary has none, its first character."""
        return "\n" if b"\n" in self.pieces else self.decode([0])

    def show(self, i: int) -> str:
        """One token for a person: its text quoted, or its name if it is special."""
        names = {v: k for k, v in self.specials.items()}
        return names[i] if i in names else repr(self.pieces[i].decode("utf-8", errors="replace"))

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        path.write_text(self.to_json(), encoding="utf-8")


class StreamDecoder:
    """Text of ids one by one, never half a character. Feeding ids and flushing gives decode(ids)."""

    def __init__(self, tokenizer: Tokenizer):
        self._pieces = tokenizer.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, i: int) -> str:
        """The text that token i completes; may be empty."""
        return self._decoder.decode(self._pieces[i])

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class CharTokenizer(Tokenizer):
    """One token a character of the training text, in code-point order.

    CharTokenizer.train(["abba"]).encode("ab") -> [0, 1]. `unknown` says what encode does with another character: "error",
    "skip", or "bytes" (its UTF-8 bytes, as 256 further tokens).
    """

    def __init__(self, characters: str, unknown: str = "error", specials: Sequence[str] = ()):
        self.characters, self.unknown = characters, unknown
        byte_pieces = [bytes([b]) for b in range(256)] if unknown == "bytes" else []
        pieces = [c.encode("utf-8") for c in characters] + byte_pieces
        super().__init__(pieces + [b""] * len(specials), {s: len(pieces) + i for i, s in enumerate(specials)})
        points = np.array([ord(c) for c in characters], dtype=np.int64)
        self._ids = np.full(int(points.max(initial=0)) + 2, -1, dtype=np.int32)  # last entry: everything beyond
        self._ids[points] = np.arange(len(points))

    @classmethod
    def train(cls, texts: Iterable[str], unknown: str = "error", specials: Sequence[str] = ()) -> CharTokenizer:
        """The tokenizer of all characters in the texts."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        return cls("".join(sorted(seen)), unknown, specials)

    def encode(self, text: str, line: int = 1) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        return ids if (ids >= 0).all() else self._with_unknown(text, ids, line)

    def _with_unknown(self, text: str, ids: np.ndarray, line: int) -> np.ndarray:
        """Ids where -1 marks a character outside the vocabulary -> ids without, as `unknown` says."""
        where = np.flatnonzero(ids < 0)
        if self.unknown == "error":
            raise InputError(self._complaint(text, where, line))
        if self.unknown == "skip":
            return ids[ids >= 0]
        spelled = {i: [len(self.characters) + b for b in text[i].encode("utf-8", errors="replace")] for i in where}
        return np.fromiter((j for i, old in enumerate(ids) for j in spelled.get(i, (old,))), dtype=np.int32)

    def _complaint(self, text: str, where: np.ndarray, line: int) -> str:
        """Names the characters outside the vocabulary and where each first stands."""
        first: dict[str, int] = {}
        for i in where[:100_000]:
            first.setdefault(text[i], int(i))
        places = [
            f"{c!r} at line {text.count(chr(10), 0, i) + line} column {i - text.rfind(chr(10), 0, i)}"
            for c, i in list(first.items())[:5]
        ]
        more = f" and {len(first) - 5} more" if len(first) > 5 else ""
        return (
            f"{len(where)} character{'s are' if len(where) > 1 else ' is'} not in the vocabulary of {len(self.characters)}: "
            f"{', '.join(places)}{more}; leave them out, or use --unknown skip (or train with --unknown bytes)"
        )

    def to_json(self) -> str:
        # BPE without merges splits a text into its characters and knows byte fallback: the library's nearest equal
        names = [*self.characters, *(f"<0x{b:02X}>" for b in range(256) if self.unknown == "bytes"), *self.specials]
        fallback = self.unknown == "bytes"
        fuse: dict[str, Any] = {"type": "Fuse"}
        both = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, fuse]}
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": []}
        model |= {"dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": fallback}
        model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
        blank = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None}
        content = {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": name, **added} for name, i in self.specials.items()],
            "decoder": both if fallback else fuse,
            "model": model,
        }
        return json.dumps(blank | content, ensure_ascii=False)


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, GPT-2's form) by the `tokenizers` library."""

    def __init__(self, inner: Any):
        self.inner = inner
        inner.encode_special_tokens = True  # "<|endoftext|>" in a text is text, not the token
        specials = {t.content: i for i, t in inner.get_added_tokens_decoder().items() if t.special}
        size = inner.get_vocab_size(with_added_tokens=True)
        names = {i: inner.id_to_token(i) for i in range(size)}
        to_byte = byte_of_symbol()
        special_ids = set(specials.values())
        pieces = [b"" if i in special_ids else bytes(to_byte[c] for c in names[i]) for i in range(size)]
        super().__init__(pieces, specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ()) -> BPETokenizer:
        """Learn merges until there are vocab_size tokens (256 bytes and the specials included), or no pair is left."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    def encode(self, text: str, line: int = 1) -> np.ndarray:
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair, as of a bad byte in argv
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def to_json(self) -> str:
        return self.inner.to_str()


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: {"A": 65, ..., "Ġ": 32, ...}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def train_tokenizer(texts: Iterable[str], config: DataConfig, specials: Sequence[str]) -> Tokenizer:
    """The tokenizer that DataConfig asks for, learned from the texts."""
    if config.tokenizer == "char":
        return CharTokenizer.train(texts, config.unknown, specials)
    return BPETokenizer.train(texts, config.vocab_size, specials)


def load_tokenizer(path: Path, unknown: str = "error") -> Tokenizer:
    """The tokenizer of a tokenizer.json that kobza wrote. `unknown` (error or skip) is for characters."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: no such tokenizer ({error.strerror}); take it from a kobza checkpoint") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a tokenizer.json: {error}; take it from a kobza checkpoint") from None
    try:
        content = json.loads(text)
        specials = [token["content"] for token in content["added_tokens"]]
        if content["pre_tokenizer"] is not None:
            return _bpe_from_json(text)
        vocab, fallback = content["model"]["vocab"], content["model"]["byte_fallback"]
        names = sorted(vocab, key=vocab.__getitem__)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a tokenizer.json ({error!r}); take it from a kobza checkpoint") from None
    require(sorted(vocab.values()) == list(range(len(names))), f"{path}: ids are not 0, 1, 2, ...; the file is damaged")
    characters = "".join(name for name in names if len(name) == 1)
    return CharTokenizer(characters, "bytes" if fallback else unknown, specials)


def _bpe_from_json(text: str) -> BPETokenizer:
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from None
    return BPETokenizer(inner)
