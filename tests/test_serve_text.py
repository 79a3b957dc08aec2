"""Text as it can be shown: stop strings across tokens, half characters, and the bytes of tokens, for every kind of tokenizer."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.serve.text import StopFinder, TextStream, text_offsets, token_bytes
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, Tokenizer, tokenizer_json

TEXT = "Садок вишневий коло хати, the cat sat on the mat; 日本 👩‍👩‍👧 abcabcab.\n" * 3
END = "<|endoftext|>"


def sentencepiece() -> LibraryTokenizer:
    """Unigram with byte fallback and a space before every text, as SentencePiece's files have it."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁the",
        "▁cat",
        *"abcdehmnost;,.",
        "С",
        "а",
    ]
    vocab = [[word, -float(i)] for i, word in enumerate(words)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoder = {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return LibraryTokenizer(tokenizer_json(model, specials, pre_tokenizer=space, decoder=decoder))


KINDS: dict[str, Tokenizer] = {
    "characters": CharTokenizer.train([TEXT], "error", [END]),
    "characters and bytes": CharTokenizer.train(["abc "], "bytes", [END]),
    "bytes": ByteTokenizer([END]),
    "bpe": LibraryTokenizer.train([TEXT], 320, [END]),
    "sentencepiece": sentencepiece(),
}


def shown(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> list[str]:
    stream = TextStream(tokenizer, stops)
    pieces = [stream.feed(i) for i in ids]
    return [*pieces, stream.flush()]


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is whole first; of two that end together the longer one."""
    for stop in range(len(text) + 1):
        places = [stop - len(s) for s in stops if text[:stop].endswith(s)]
        if places:
            return text[: min(places)]
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_cut_at_the_first_stop(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(60):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 40))]  # half characters too
        text = tokenizer.decode(ids, continues=True)
        places = [rng.randrange(len(text)) for _ in range(3)] if text else []
        stops = [text[i : i + rng.randrange(1, 6)] for i in places] + ["nowhere in it"]
        assert "".join(shown(tokenizer, ids, stops)) == cut(text, stops)
        assert "".join(shown(tokenizer, ids, [])) == text


@settings(max_examples=50, deadline=None)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=20, max_size=20),
)
def test_a_cut_does_not_depend_on_how_the_text_came(text: str, stops: list[str], sizes: list[int]) -> None:
    finder, said, place = StopFinder(stops), "", 0
    for size in sizes:
        if not finder.found:
            said += finder.feed(text[place : place + size])
        place += size
    said += "" if finder.found else finder.held
    assert said == cut(text, stops)
    assert finder.found == (cut(text, stops) != text or any(s in text for s in stops))


def test_what_may_become_a_stop_is_held_back_and_no_more() -> None:
    stream = TextStream(KINDS["bytes"], ["\n\nQ:"])
    assert [stream.feed(i) for i in b"a\n\nQx\n"] == ["a", "", "", "", "\n\nQx", ""]
    assert stream.flush() == "\n" and not stream.found and stream.flush() == ""


def test_nothing_comes_after_a_stop() -> None:
    stream = TextStream(KINDS["bytes"], ["b"])
    assert [stream.feed(i) for i in b"abc"] == ["a", "", ""] and stream.found and stream.flush() == ""


def test_an_unfinished_character_is_shown_at_the_end_alone() -> None:
    assert shown(KINDS["bytes"], list("ї".encode()[:1]), []) == ["", "\ufffd"]
    assert shown(KINDS["bytes"], list("ї".encode()[:1]), ["\ufffd"]) == ["", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_joined_are_the_bytes_of_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("abc abc", continues=True).tolist()
    assert b"".join(token_bytes(tokenizer, i) for i in ids) == b"abc abc"
    for name, i in tokenizer.specials.items():
        assert token_bytes(tokenizer, i) == name.encode()


def test_bytes_of_a_part_of_a_character() -> None:
    assert token_bytes(KINDS["bytes"], 0xD1) == b"\xd1"
    letter = KINDS["sentencepiece"].encode("ї", continues=True).tolist()
    assert [token_bytes(KINDS["sentencepiece"], i) for i in letter] == [b"\xd1", b"\x97"]


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_point_into_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("abc abcab", continues=True).tolist()
    offsets = text_offsets(tokenizer, ids, 5)
    text = tokenizer.decode(ids, continues=True)
    for place, stop, i in zip(offsets, [*offsets[1:], 5 + len(text)], ids, strict=True):
        assert text[place - 5 : stop - 5].encode() == tokenizer.pieces[i]
    assert text_offsets(KINDS["bytes"], list("aї!".encode())) == [0, 1, 1, 2]


def test_an_id_without_a_token_has_no_bytes() -> None:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 3}, "merges": []}
    tokenizer = LibraryTokenizer(json.dumps(json.loads(tokenizer_json(model, {}))))
    assert token_bytes(tokenizer, 1) == b""
