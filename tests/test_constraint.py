"""Constrained output: whatever a model draws under a mask is of the grammar, for every kind of tokenizer."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from kobza.config import InputError  # noqa: E402
from kobza.serve.constraint import KEPT, MOST_SOURCE, Constraint, Grammars, State  # noqa: E402
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, Tokenizer  # noqa: E402
from tests.test_serve_text import sentencepiece  # noqa: E402

END = "<|endoftext|>"
ASCII = "".join(map(chr, range(32, 127))) + "\n"
TEXT = '{"name": "Ann", "age": 12, "tags": ["a", "b"], "good": true, "none": null} ' * 20
KINDS: dict[str, Tokenizer] = {
    "characters": CharTokenizer(ASCII, specials=[END]),
    "characters without an end": CharTokenizer(ASCII),
    "bytes": ByteTokenizer([END]),
    "bpe": LibraryTokenizer.train([TEXT], 320, [END]),
    "sentencepiece": sentencepiece(),
}
GRAMMARS = {kind: Grammars(tokenizer, tokenizer.ends) for kind, tokenizer in KINDS.items()}


def write(constraint: Constraint, kind: str, seed: int, most: int = 400) -> str | None:
    """What a random model writes that tires of long texts; None where it does not come to an end."""
    tokenizer, rng, ids = KINDS[kind], random.Random(seed), []
    closing = {i for i, piece in enumerate(tokenizer.pieces) if piece in (b'"', b"}", b"]")}
    state = constraint.start()
    for n in range(most):
        if state.ended:
            return tokenizer.decode(ids, continues=True)
        allowed = state.allowed().nonzero().flatten().tolist()
        assert allowed, "a row was left with nothing"
        ends = [i for i in allowed if i in tokenizer.ends]
        if ends and (len(ends) == len(allowed) or rng.random() < 0.2):
            return tokenizer.decode(ids, continues=True)
        rest = [i for i in allowed if i not in ends]
        short = [i for i in rest if i in closing] if rng.random() < n / 60 else []
        ids.append(rng.choice(short or rest))
        state.advance(ids[-1])
    return None


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    plain = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(
            lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n}, st.integers(-50, 50), st.integers(0, 99)
        ),
        st.builds(
            lambda n, m: {"type": "string", "minLength": n, "maxLength": n + m}, st.integers(0, 3), st.integers(0, 9)
        ),
        st.builds(
            lambda words: {"enum": words},
            st.lists(st.sampled_from(["a", "b c", 'd"', 7, None]), min_size=1, unique=True),
        ),
        st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
    )
    if depth == 0:
        return plain
    inner = schemas(depth - 1)
    lists = st.builds(
        lambda item, n: {"type": "array", "items": item, "minItems": n, "maxItems": n + 2}, inner, st.integers(0, 2)
    )
    names = st.dictionaries(st.sampled_from(["a", "b", "key", "x y"]), inner, max_size=3)

    def made(properties: dict[str, Any], required: int, closed: bool) -> dict[str, Any]:
        made = {"type": "object", "properties": properties, "required": sorted(properties)[:required]}
        return made | ({"additionalProperties": False} if closed else {"additionalProperties": {"type": "integer"}})

    objects = st.builds(made, names, st.integers(0, 3), st.booleans())
    return st.one_of(plain, lists, objects, st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner))


@settings(max_examples=50, deadline=None)
@given(schemas(), st.sampled_from(sorted(KINDS)), st.integers(0, 999))
def test_what_is_written_under_a_schema_validates(schema: dict[str, Any], kind: str, seed: int) -> None:
    text = write(GRAMMARS[kind].json_schema(schema), kind, seed)
    assert text is not None
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("kind", KINDS)
def test_any_json_object(kind: str) -> None:
    texts = [write(GRAMMARS[kind].json_object(), kind, seed) for seed in range(20)]
    objects = [json.loads(text) for text in texts if text is not None]
    assert len(objects) > 10 and all(isinstance(value, dict) for value in objects) and any(objects)


REGEXES = [
    r"[a-z]+@[a-z]{2,5}\.(com|org)",
    r"(yes|no)",
    r"-?\d{1,3}(\.\d+)?",
    r"a*",
    r"(ab|ba){2,3}c?",
    r"[^a-y]{3}",
    "a/b\nc",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", REGEXES)
def test_what_is_written_under_a_regex_matches(kind: str, pattern: str) -> None:
    texts = [write(GRAMMARS[kind].regex(pattern), kind, seed) for seed in range(10)]
    endless = not KINDS[kind].ends  # then a text that may go on does
    assert endless or any(text is not None for text in texts)
    assert all(text is None or re.fullmatch(pattern, text) for text in texts)


def test_a_lark_grammar() -> None:
    sums = 'start: term ("+" term)*\nterm: /[0-9]{1,2}/ | "(" start ")"'
    texts = [text for seed in range(20) if (text := write(GRAMMARS["bpe"].grammar(sums), "bpe", seed)) is not None]
    assert len(set(texts)) > 5
    for text in texts:
        assert re.fullmatch(r"[0-9+()]+", text) and text.count("(") == text.count(")") and "++" not in text


def allowed(state: State, tokenizer: Tokenizer) -> set[bytes]:
    return {tokenizer.pieces[i] for i in state.allowed().nonzero().flatten().tolist()}


def test_every_spelling_is_allowed() -> None:
    """A piece that begins the text is allowed, whatever a tokenizer itself would have taken: none is forced."""
    tokenizer = LibraryTokenizer.train(["aaaa aaaa aaaa"], 262, [END])
    assert b"aa" in tokenizer.pieces and b"aaaa" in tokenizer.pieces
    state = Grammars(tokenizer, tokenizer.ends).regex("aaa").start()
    assert allowed(state, tokenizer) == {b"a", b"aa"}
    state.advance(tokenizer.pieces.index(b"aa"))
    assert allowed(state, tokenizer) == {b"a"} and not state.ended
    state.advance(tokenizer.pieces.index(b"a"))
    assert state.ended and state.allowed().nonzero().flatten().tolist() == tokenizer.ends


def test_an_end_is_allowed_when_the_text_is_whole_and_not_before() -> None:
    tokenizer = ByteTokenizer([END, "<|im_end|>"])
    state = Grammars(tokenizer, [256, 257]).regex("ab*").start()
    assert state.allowed()[[256, 257]].tolist() == [False, False]
    state.advance(ord("a"))
    assert state.allowed()[[256, 257]].tolist() == [True, True] and not state.ended


def test_without_an_end_in_the_vocabulary_ended_tells() -> None:
    tokenizer = CharTokenizer("ab")
    state = Grammars(tokenizer).regex("ab").start()
    for i in (0, 1):
        assert state.allowed().shape == (2,) and not state.ended
        state.advance(i)
    assert state.ended and not state.allowed().any()


def test_special_tokens_are_no_text() -> None:
    """<tag> as a special token never stands for the five characters."""
    tokenizer = ByteTokenizer([END, "<tag>"])
    state = Grammars(tokenizer, [256]).regex("<tag>").start()
    assert state.allowed().nonzero().flatten().tolist() == [ord("<")]
    state = Grammars(tokenizer, [256]).grammar('start: <tag> "x"').start()
    assert state.allowed().nonzero().flatten().tolist() == [257]


def test_rows_without_a_token_are_forbidden() -> None:
    """A model may have more rows than its tokenizer has tokens."""
    grammars = Grammars(ByteTokenizer([END]), [256], vocab_size=300)
    mask = grammars.regex(".*").start().allowed()
    assert mask.shape == (300,) and mask.dtype == torch.bool and not mask[257:].any() and mask[256]


def test_copies_and_rollback_are_the_state_before() -> None:
    """Speculation looks ahead and takes back."""
    constraint = GRAMMARS["bytes"].json_schema({"type": "array", "items": {"enum": ["ab", "ac", 12]}, "minItems": 3})
    rng, state, masks, ids = random.Random(0), constraint.start(), [], []
    while not state.ended and len(ids) < 60:
        masks.append(state.allowed())
        ids.append(rng.choice([i for i in masks[-1].nonzero().flatten().tolist() if i != 256] or [256]))
        copy = state.copy()
        state.advance(ids[-1])
        assert torch.equal(copy.allowed(), masks[-1]), "a copy moved with its original"
    for n in (1, 2, len(ids) - 3):
        state.rollback(n)
        del ids[len(ids) - n :]
        assert torch.equal(state.allowed(), masks[len(ids)])
    state.rollback(0)
    assert ids == [] and torch.equal(state.allowed(), masks[0])


def test_masks_stay_as_they_were_given() -> None:
    state = GRAMMARS["bytes"].regex("ab").start()
    first = state.allowed()
    state.advance(ord("a"))
    state.allowed()
    assert first.nonzero().flatten().tolist() == [ord("a")]


@pytest.mark.parametrize(
    ("characters", "lacking"), [("ab:1,}", "'{'"), ('{}":1b ', "'a'"), ("", "'{'"), ('{"a:1 ', "'}'"), ('{}"a ', "':'")]
)
def test_characters_that_a_vocabulary_lacks_are_named(characters: str, lacking: str) -> None:
    tokenizer = CharTokenizer("".join(sorted(characters)), specials=[END])
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    with pytest.raises(InputError, match=r"no token that begins with .*" + re.escape(lacking)):
        Grammars(tokenizer, tokenizer.ends).json_schema(schema)


def test_a_dead_end_on_the_way_is_an_error_and_no_row_of_nothing() -> None:
    """`a` leads on, `b` does not: `x` is no character here. Nobody can know before."""
    tokenizer = CharTokenizer("abc", specials=[END])
    state = Grammars(tokenizer, tokenizer.ends).regex("ac|bx").start()
    assert allowed(state, tokenizer) == {b"a", b"b"}
    state.advance(1)
    with pytest.raises(InputError, match="regex: .* begins with 'x'"):
        state.allowed()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (lambda g: g.json_schema({"type": "objekt"}), "objekt"),
        (lambda g: g.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
        (lambda g: g.json_schema({"$ref": "http://127.0.0.1:9/x"}), "does not fetch"),
        (lambda g: g.json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength (5)"),
        (lambda g: g.json_schema([1]), "is a list"),
        (lambda g: g.json_schema({"enum": [object()]}), "no JSON"),
        (lambda g: g.json_schema({"not": {}, "x-guidance": {"lenient": True}}), "Unimplemented"),
        (lambda g: g.regex("a[bc"), "unclosed character class"),
        (lambda g: g.regex("a(?=b)"), "look-around"),
        (lambda g: g.regex(""), "empty"),
        (lambda g: g.regex("x" * (MOST_SOURCE + 1)), "65,537 characters"),
        (lambda g: g.regex("(" * 5000 + ")" * 5000), "regex"),
        (lambda g: g.grammar("start: foo"), 'unknown name: "foo"'),
        (lambda g: g.grammar("start: " + "(" * 9000 + '"a"' + ")" * 9000), "nested"),
        (lambda g: g.grammar('start: "a"\n%llguidance {"no_forcing": false}'), "%llguidance"),
        (lambda g: g.grammar("start: <[999]>"), "999"),
        (lambda g: g.grammar(""), "start"),
    ],
)
def test_bad_sources_are_one_line(source: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as refused:
        source(GRAMMARS["bytes"])
    line = str(refused.value)
    assert "\n" not in line and len(line) < 400 and "no_forcing" not in line


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InputError):
        GRAMMARS["bytes"].json_schema(schema)


@pytest.mark.parametrize(
    "pattern", ["(a{1000}b?){1000}", "(a|b|ab|ba)*" * 40 + "[ab]*a[ab]{40}", "(((a{99}){99}){99}){99}", "(.*a){30}"]
)
def test_a_costly_grammar_ends_soon(pattern: str) -> None:
    """It works or is refused; it does not take the server with it."""
    began = time.process_time()
    try:
        text = write(GRAMMARS["bytes"].regex(pattern), "bytes", 0, 50)
        assert text is None or text == "" or text[0] in "ab" or "." in pattern  # re itself would never come to an end
    except InputError as error:
        assert "\n" not in str(error)
    assert time.process_time() - began < 5


def test_a_grammar_is_compiled_once_and_kept_for_a_while() -> None:
    grammars = Grammars(KINDS["bytes"], [256])
    first = grammars.regex("a+")
    assert grammars.regex("a+") is first
    for n in range(KEPT):
        grammars.regex(f"b{{{n + 1}}}")
    assert grammars.regex("a+") is not first


def test_white_space_comes_to_an_end() -> None:
    """Else a model that likes line ends writes them until its tokens are spent. json.dumps's own forms are all allowed."""
    constraint = GRAMMARS["bytes"].json_object()
    state = constraint.start()
    for i in b"{\n":
        state.advance(i)
    n = 0
    while state.allowed()[ord(" ")]:
        state.advance(ord(" "))
        n += 1
    assert n == 24 and not state.allowed()[ord("\n")]
    for how in ({}, {"indent": 4}, {"separators": (",", ":")}):
        text, state = json.dumps({"a": [1, {"b": []}], "c": {"d": {"e": None}}}, **how), constraint.start()
        for i in text.encode():
            assert state.allowed()[i]
            state.advance(i)
        assert state.ended


def test_a_mask_over_a_large_vocabulary_takes_microseconds() -> None:
    rng = random.Random(0)
    words = sorted({"".join(rng.choices('abcdefghijklmnop {}":,', k=rng.randrange(2, 8))) for _ in range(60000)})[
        :48_000
    ]
    tokenizer = CharTokenizer("".join(map(chr, range(1, 128))), specials=[END])
    tokenizer.pieces[-1:] = [word.encode() for word in words] + [b""]
    tokenizer.vocab_size = len(tokenizer.pieces)
    tokenizer.specials = {END: tokenizer.vocab_size - 1}
    state, times = Grammars(tokenizer, [tokenizer.vocab_size - 1]).json_object().start(), []
    for character in '{"abc":{"d':
        began = time.perf_counter()
        state.allowed()
        times.append(time.perf_counter() - began)
        state.advance(ord(character) - 1)
    assert sorted(times)[len(times) // 2] < 2e-3, times  # 20 us on an idle core
