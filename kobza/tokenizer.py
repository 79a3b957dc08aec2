"""BLOCK 1: text <-> ids. Characters, bytes, and what the `tokenizers` library serves; one interface, one file `tokenizer.json`.

Every token has its bytes (`pieces`), so decoding, bits per byte and streaming are the same few lines for all kinds. The file is
the `tokenizers` library's own format: that library, and what builds on it, loads ours, and we load any of its. Where other
formats come from (tiktoken's encodings, SentencePiece models) is the hub's business; it hands over a tokenizer of these.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import LEARNED, DataConfig, InputError, require

EOT = "<|endoftext|>"  # parts documents; GPT-2's name
BOS = "<|begin|>"
END_NAMES = (EOT, "</s>", "<eos>", "<|end_of_text|>")  # what others call it: Llama 2, Gemma, Llama 3
CHUNK = 1 << 13  # characters the library takes at a time, several in parallel
# What the byte-level patterns do on one side of such a place does not depend on the other: a run of letters or digits ends
# before it in all of them, and no white space whose split looks ahead stands on its left.
CUT = re.compile(r"(?<=[^\W_])\n")
# What a lossless tokenizer gives back: white space at every place, forms that normalizers fold, characters that few know.
PROBES = (
    "a b",
    " a",
    "  a\t b \n\n c\r\n ",
    "don't , x .",
    "Aé e\u0301 ＡＢ ﬁ ½ İ",
    "їґ 日本 👩‍👩‍👧 \u200d\ufeff\ue000\U0010fffd\x00\x7f",
)


class Tokenizer:
    """What all kinds share. `pieces[i]` are the bytes of token i; a special token, or an id without a token, has none.

    `prefix` is what encode puts before a text of its own accord: SentencePiece's space. decode takes it away again. A text that
    goes on from another (`continues`) has none. `lossless`: any text comes back as it was. SentencePiece kinds count as such
    although they make a space of U+2581, which stands for it.
    """

    def __init__(self, pieces: list[bytes], specials: dict[str, int]):
        self.pieces, self.specials, self.prefix, self.probes = pieces, specials, b"", PROBES
        self.vocab_size = len(pieces)
        self.bos_id = specials.get(BOS)
        self.eot_id = next((specials[name] for name in END_NAMES if name in specials), None)
        self.piece_bytes = np.array([len(piece) for piece in pieces], dtype=np.int64)

    @property
    def ends(self) -> list[int]:
        """The ids that end a text."""
        return [] if self.eot_id is None else [self.eot_id]

    @cached_property
    def lossless(self) -> bool:
        """Whether decode(encode(text)) is the text, as far as hard examples show."""
        return all(self.decode(self.encode(probe)) == probe for probe in self.probes)

    def encode(self, text: str, line: int = 1, continues: bool = False) -> np.ndarray:
        """Ids (n,) int32 of a text; special tokens are never read out of it. `line` is the number of its first line."""
        raise NotImplementedError

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        raise NotImplementedError

    def with_specials(self, names: Sequence[str]) -> Tokenizer:
        """The same with further special tokens, which take the ids from vocab_size on."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        spelled = b"".join(self.pieces[i] for i in ids)
        return (spelled if continues else spelled.removeprefix(self.prefix)).decode("utf-8", errors="replace")

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a text to be continued; a beginning token stands first where models are trained with one."""
        ids = ([] if self.bos_id is None else [self.bos_id]) + self.encode(prompt).tolist()
        require(bool(ids), "the prompt is empty; give at least one character of the vocabulary")
        return ids

    def line_start(self) -> str:
        """A prompt that says nothing: a line end, or where the vocabulary has none, its first token that is text."""
        if b"\n" in self.pieces:
            return "\n"
        texts = (self.decode([i]) for i in range(self.vocab_size))
        return next((text for text in texts if text and "\ufffd" not in text), "")

    def show(self, i: int) -> str:
        """One token for a person: its text quoted, or its name if it is special."""
        names = {v: k for k, v in self.specials.items()}
        return names[i] if i in names else repr(self.pieces[i].decode("utf-8", errors="replace"))

    def save(self, path: Path) -> None:
        """Write tokenizer.json."""
        path.write_text(self.to_json(), encoding="utf-8")


class StreamDecoder:
    """Text of ids one by one, never half a character. Feeding ids and flushing gives decode(ids, continues)."""

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._pieces, self._prefix = tokenizer.pieces, b"" if continues else tokenizer.prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, i: int) -> str:
        """The text that token i completes; may be empty."""
        piece = self._pieces[i]
        if piece and self._prefix:  # one byte at most, so the first piece has it or none
            piece, self._prefix = piece.removeprefix(self._prefix), b""
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


# ---- characters and bytes ------------------------------------------------------------------------------------------


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

    @property
    def lossless(self) -> bool:  # type: ignore[override]
        return self.unknown != "skip"

    def encode(self, text: str, line: int = 1, continues: bool = False) -> np.ndarray:
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
        fallback = self.unknown == "bytes"
        names = [*self.characters, *(f"<0x{b:02X}>" for b in range(256) if fallback), *self.specials]
        model = {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [],
            "byte_fallback": fallback,
        }
        fuse: dict[str, Any] = {"type": "Fuse"}
        both = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, fuse]}
        return tokenizer_json(model, self.specials, decoder=both if fallback else fuse)

    def with_specials(self, names: Sequence[str]) -> CharTokenizer:
        return CharTokenizer(self.characters, self.unknown, [*self.specials, *names])


class ByteTokenizer(Tokenizer):
    """One token a byte of the text's UTF-8: ids 0 to 255, then the special ones. encode("і") -> [209, 150]"""

    def __init__(self, specials: Sequence[str] = ()):
        pieces = [bytes([b]) for b in range(256)] + [b""] * len(specials)
        super().__init__(pieces, {name: 256 + i for i, name in enumerate(specials)})

    def encode(self, text: str, line: int = 1, continues: bool = False) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)

    def to_json(self) -> str:
        model = {"type": "BPE", "vocab": byte_of_symbol(), "merges": []}
        return tokenizer_json(model, self.specials, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)

    def with_specials(self, names: Sequence[str]) -> ByteTokenizer:
        return ByteTokenizer([*self.specials, *names])


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted: {"A": 65, ..., "Ġ": 32, ...}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def tokenizer_json(
    model: dict[str, Any], specials: dict[str, int], own: dict[str, int] | None = None, **parts: Any
) -> str:
    """The text of a tokenizer.json: a model, special tokens, further tokens that are read whole out of a text (`own`), and the
    parts around (normalizer, pre_tokenizer, decoder)."""
    blank = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    if model["type"] == "BPE":
        unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
        model = unset | dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False) | model
    tokens = [(i, name, True) for name, i in specials.items()] + [(i, name, False) for name, i in (own or {}).items()]
    added = [_added(name, i, special) for i, name, special in sorted(tokens)]
    content = {"version": "1.0", "added_tokens": added, **blank, **parts, "model": model}
    return json.dumps(content, ensure_ascii=False)


def _added(name: str, i: int, special: bool = True) -> dict[str, Any]:
    """A token beside the model's in tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": special}


# ---- the library's -------------------------------------------------------------------------------------------------


class LibraryTokenizer(Tokenizer):
    """Any tokenizer.json, by the `tokenizers` library: byte-level BPE (Sennrich et al. 2016, GPT-2's form), BPE with byte
    fallback, Unigram (Kudo 2018), WordPiece. The ids are the library's; the pieces come from its vocabulary and decoder.

    `cuts`: whether CUT may part a text without changing ids; then a long one is encoded in parallel.
    """

    def __init__(self, text: str, cuts: bool | None = None, parsed: Any = None):
        self._text, content = text, parsed or json.loads(text)
        self.inner = _inner(text, content)
        added = sorted(self.inner.get_added_tokens_decoder().items())
        super().__init__(_pieces(self.inner, content), {token.content: i for i, token in added if token.special})
        self.probes += tuple(f"a {token.content} b" for _, token in added[:50] if not token.special)
        self._bare = content | {key: _without_prefix(content[key]) for key in ("normalizer", "pre_tokenizer")}
        joined = content["decoder"] is None or "WordPiece" in _types(content["decoder"])  # a space before every word
        self.prefix = b" " if joined or self._bare != content else b""
        self.cuts = _gpt2_pattern(content) if cuts is None else cuts
        self._take_template()

    def _take_template(self) -> None:
        """The tokens that the file itself puts around a text are its beginning and its end."""
        around = self.inner.encode("a", add_special_tokens=True)
        mask = around.special_tokens_mask
        if 0 in mask and mask[0] and self.bos_id is None:
            self.bos_id = around.ids[0]
        if 0 in mask and mask[-1] and self.eot_id is None:
            self.eot_id = around.ids[-1]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ()) -> LibraryTokenizer:
        """Learn byte-level merges until there are vocab_size tokens (256 bytes and the specials included), or no pair is left."""
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
        inner.train_from_iterator((chunk for text in texts for chunk in chunks(text)), trainer)
        return cls(inner.to_str())

    def encode(self, text: str, line: int = 1, continues: bool = False) -> np.ndarray:
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # half a surrogate pair, as of a bad byte in argv
        inner = self._going_on if continues and self.prefix else self.inner
        parts = list(chunks(text)) if self.cuts else [text]
        encodings = inner.encode_batch_fast(parts, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])

    @cached_property
    def _going_on(self) -> Any:
        """The library's tokenizer for a text that goes on from another: nothing is put before it."""
        return _inner(json.dumps(self._bare), self._bare)

    def to_json(self) -> str:
        return self._text

    def with_specials(self, names: Sequence[str]) -> LibraryTokenizer:
        content = json.loads(self._text)
        for i, name in enumerate(names, self.vocab_size):
            content["added_tokens"].append(_added(name, i))
            vocab = content["model"]["vocab"]
            if isinstance(vocab, dict):
                vocab[name] = i  # so the id holds even where the ids before it have holes
        return LibraryTokenizer(json.dumps(content, ensure_ascii=False), self.cuts)


def chunks(text: str) -> Iterator[str]:
    """The text in parts of about CHUNK characters, cut before a line end that follows a letter or digit."""
    start = 0
    while (place := CUT.search(text, start + CHUNK)) is not None:
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def _inner(text: str, content: dict[str, Any]) -> Any:
    """The library's tokenizer out of the text of its file, which `content` is too; it reads no special token out of a text."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from None
    inner.encode_special_tokens = True  # "<|endoftext|>" in a text is text, not the token
    inner.no_padding()
    inner.no_truncation()
    model = content["model"]
    if model["type"] != "BPE":  # these find any token that a text spells, also <s> and the byte <0x41>
        names = [token["content"] for token in content["added_tokens"] if token["special"]]
        names += [name for name in _BYTE_NAMES if model.get("byte_fallback")]
        apart = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1)
        splits = [] if inner.pre_tokenizer is None else [inner.pre_tokenizer]
        splits += [pre_tokenizers.Split(Regex(apart), "isolated")] if apart else []
        inner.pre_tokenizer = pre_tokenizers.Sequence(splits) if splits else None
    return inner


def _types(part: Any) -> set[str]:
    """Types of a decoder, normalizer or pre-tokenizer in a tokenizer.json and of its parts."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    return {part["type"]}.union(*map(_types, part.values())) if isinstance(part, dict) and "type" in part else set()


def _gpt2_pattern(content: dict[str, Any]) -> bool:
    """Whether the file splits text by GPT-2's pattern and does nothing else to it."""
    split = content["pre_tokenizer"]
    plain = split is not None and split["type"] == "ByteLevel" and not split["add_prefix_space"]
    return plain and split.get("use_regex", True) and content["normalizer"] is None


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer of a tokenizer.json that puts nothing before a text; what puts nothing stays as it is."""
    if isinstance(part, list):
        return [_without_prefix(p) for p in part if p["type"] != "Prepend"]
    kind = None if part is None else part["type"]
    if kind == "Metaspace" and part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True):
        return part | {"prepend_scheme": "never", "add_prefix_space": False}
    if kind == "ByteLevel" and part["add_prefix_space"]:
        return part | {"add_prefix_space": False}
    if kind == "Sequence":
        return {key: value if key == "type" else _without_prefix(value) for key, value in part.items()}
    return None if kind == "Prepend" else part


def _pieces(inner: Any, content: dict[str, Any]) -> list[bytes]:
    """The bytes of each id by the file's decoder, as the token stands inside a text; an id without a token has none."""
    vocab, decoder, added = content["model"]["vocab"], content["decoder"], inner.get_added_tokens_decoder()
    ids = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    named = {i: name for name, i in ids} | {i: token.content for i, token in added.items()}
    top = max(named, default=-1)
    require(top < 2 * len(named) + 1_000_000, f"its largest id is {top:,} though it has {len(named):,} tokens: damaged")
    names = [named.get(i, "") for i in range(top + 1)]
    types = _types(decoder)
    if "ByteLevel" in types:  # all at once, for there may be 200,000: a symbol is a byte
        table = {ord(symbol): byte for symbol, byte in byte_of_symbol().items()}
        spelled = "".join(names).translate(table).encode("latin-1", errors="replace")
        stops = np.cumsum([len(name) for name in names]).tolist()
        pieces = [spelled[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
    else:
        pieces = [_piece(inner.decoder, types, name) for name in names]
    for i, token in added.items():
        pieces[i] = b"" if token.special else token.content.encode("utf-8")
    return pieces


_BYTE_NAMES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}


def _piece(decoder: Any, types: set[str], name: str) -> bytes:
    """What a decoder makes of one token beside another, which takes up what belongs to a text's edge."""
    other = "\ue000"
    if not name or ("ByteFallback" in types and name in _BYTE_NAMES):
        return _BYTE_NAMES.get(name, b"")
    if decoder is None:  # the library then joins tokens by spaces
        return f" {name}".encode()
    if "BPEDecoder" in types:  # "word</w>" -> "word ", but at a text's end "word"
        return decoder.decode([name, other]).removesuffix(other).encode()
    return decoder.decode([other, name]).removeprefix(other).encode()


# ---- learn and load ------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], config: DataConfig, specials: Sequence[str]) -> Tokenizer:
    """The tokenizer that DataConfig asks for, learned from the texts."""
    kind = config.tokenizer
    require(kind in LEARNED, f"data.tokenizer {kind} is not learned from a text (those are {', '.join(LEARNED)})")
    if kind == "char":
        return CharTokenizer.train(texts, config.unknown, specials)
    return ByteTokenizer(specials) if kind == "byte" else LibraryTokenizer.train(texts, config.vocab_size, specials)


def load_tokenizer(path: Path, unknown: str = "error") -> Tokenizer:
    """The tokenizer of a tokenizer.json, kobza's or any other. `unknown` (error or skip) is for characters."""
    remedy = "name another, as of a kobza run"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: no such tokenizer ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a tokenizer.json: {error}; {remedy}") from None
    try:
        return _from_json(text, unknown)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a tokenizer.json ({error!r}); {remedy}") from None


def _from_json(text: str, unknown: str) -> Tokenizer:
    content = json.loads(text)
    specials = [token["content"] for token in content["added_tokens"] if token["special"]]
    split, model = content["pre_tokenizer"], content["model"]
    vocab, plain = model["vocab"], model.get("merges") == [] and content.get("normalizer") is None
    if plain and split == BYTE_LEVEL and {name: i for name, i in vocab.items() if i < 256} == byte_of_symbol():
        return ByteTokenizer(specials)
    if not plain or split is not None:
        return LibraryTokenizer(text, parsed=content)
    names = sorted(vocab, key=vocab.__getitem__)
    require(sorted(vocab.values()) == list(range(len(names))), "ids are not 0, 1, 2, ...; the file is damaged")
    characters = "".join(name for name in names if len(name) == 1)
    return CharTokenizer(characters, "bytes" if model["byte_fallback"] else unknown, specials)
