"""--alphabet: with random weights and any seed, only allowed characters are written, each whole, by every tokenizer."""

import unicodedata
from functools import cache

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kobza.config import InputError, ModelConfig, SampleConfig
from kobza.generate import generate
from kobza.model import build
from kobza.tokenizer import EOT, CharTokenizer, LibraryTokenizer, StreamDecoder, Tokenizer
from kobza.tokens.alphabet import LANGUAGES, Alphabet, cut, parse, restrict, shared, unfinished

TEXT = (
    "Реве та стогне Дніпр широкий, сердитий вітер завива; ґанок, їжак, об'єднання.\n"
    "The quick brown fox jumps over 13 lazy dogs. Ёлки-палки, объём!\n"
    "白日依山盡，黃河入海流。 👩‍👩‍👧 😀 é ñ «слава» — αβγ\n"
)


class Bytes(Tokenizer):
    """Bytes and an end: the smallest pieces that there are."""

    def __init__(self):
        super().__init__([bytes([b]) for b in range(256)] + [b""], {EOT: 256})


class Odd(Tokenizer):
    """Tokens across the borders of characters, without the bytes that would finish each: some beginnings are dead ends."""

    def __init__(self):
        letters = [c.encode() for c in "абвіїґ"]
        pieces = [a[1:] + b[:1] for a in letters for b in letters] + [b"\xd0", b"\xd1", "і".encode()[1:], b"\xe7\x99"]
        pieces += ["😀".encode()[:2], "😀".encode()[2:3] + b"\xd0", b" ", b"\n", b"\xff", b"", b""]
        super().__init__(pieces, {EOT: len(pieces) - 1, "<|x|>": len(pieces) - 2})


TOKENIZERS = {
    "char": CharTokenizer.train([TEXT], "error", [EOT]),
    "char with bytes": CharTokenizer.train([TEXT], "bytes", [EOT]),
    "bpe": LibraryTokenizer.train([TEXT * 3], 400, [EOT]),
    "bpe of bytes": LibraryTokenizer.train(["a"], 257, [EOT]),
    "byte": Bytes(),
    "across": Odd(),
}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
MODELS = {}


def random_model(vocab_size):
    """A model that writes noise: every token has its turn."""
    if vocab_size not in MODELS:
        config = ModelConfig(vocab_size=vocab_size, max_seq_len=16, n_layer=1, n_head=2, n_embd=16)
        MODELS[vocab_size] = build(config, seed=0)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in MODELS[vocab_size].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return MODELS[vocab_size]


def written(tokenizer, rows=3, **knobs):
    """The texts of some rows, as a person would see them come, and whether each ended by itself."""
    config = SampleConfig(**(dict(temperature=1.5, top_k=0, tokens=24) | knobs))
    model, prompt = random_model(tokenizer.vocab_size), [0, 1]
    extra = restrict(config, tokenizer, len(prompt), torch.device("cpu"))
    streams, texts, ended = [StreamDecoder(tokenizer) for _ in range(rows)], [""] * rows, [False] * rows
    for choice in generate(model, [prompt] * rows, config, tokenizer.ends, extra=extra):
        for i, token in enumerate(choice.ids):
            if token is not None:
                texts[i] += streams[i].feed(token)
                ended[i] = token in tokenizer.ends
    return [text + stream.flush() for text, stream in zip(texts, streams, strict=True)], ended


# what a spec allows, said a second way, by the names of the characters


def named(character, *words):
    """Whether a word stands in a character's name; one younger than Python's tables goes by its script."""
    name = unicodedata.name(character, "")
    return (
        any(word in name for word in words) if name else bool(regex.match(r"\p{Cyrillic}|\p{Latin}|\p{Han}", character))
    )


SPECS = {
    "Cyrillic": lambda c: named(c, "CYRILLIC") or c == "ʼ",
    "latin": lambda c: named(c, "LATIN", "MODIFIER", "ORDINAL"),
    "uk": lambda c: c.lower() in "абвгґдеєжзиіїйклмнопрстуфхцчшщьюяʼ",
    "Han, [іґ]": lambda c: named(c, "CJK", "IDEOGRAPHIC", "HANGZHOU", "FULLWIDTH", "KANGXI", "TONE") or c in "іґ",
    "'😀'": lambda c: c == "😀",
}


def stray(text, spec):
    """The characters of a text that the spec does not name; marks, digits, spaces and punctuation are let pass."""
    free = [c for c in text if c.isalpha() or not (c.isascii() or unicodedata.category(c)[0] in "PZMN")]
    return [c for c in free if not SPECS[spec](c)]


@each_tokenizer
@pytest.mark.parametrize("spec", SPECS)
def test_only_allowed_characters_are_written(name, spec):
    """Over many seeds; the random text without --alphabet shows that the test can fail."""
    if name == "across" and spec in ("latin", "'😀'"):
        with pytest.raises(InputError, match="none of the 47 tokens is written in it"):
            Alphabet(spec, TOKENIZERS[name])
        return
    seen = set()

    @settings(max_examples=12)
    @given(seed=st.integers(0, 10**6), tokens=st.integers(1, 24), top_k=st.sampled_from([0, 3]))
    def check(seed, tokens, top_k):
        for text in written(TOKENIZERS[name], alphabet=spec, seed=seed, tokens=tokens, top_k=top_k)[0]:
            assert "\ufffd" not in text and stray(text, spec) == []
            seen.update(text)

    check()
    free = "".join(written(TOKENIZERS[name], seed=1, rows=8)[0])
    assert "\ufffd" in free or stray(free, spec)
    assert len(seen) > 1


def test_what_is_allowed_is_really_written():
    for name in ("char", "bpe", "byte", "char with bytes"):
        texts = "".join(written(TOKENIZERS[name], alphabet="uk", seed=5, rows=30, tokens=60, temperature=20.0)[0])
        assert len(set(texts) & set(LANGUAGES["uk"])) > 12, name


@each_tokenizer
def test_a_text_can_still_end_and_never_within_a_character(name):
    texts, ended = written(TOKENIZERS[name], alphabet="Cyrillic", seed=0, rows=40, tokens=200, temperature=2.0)
    assert any(ended) and all("\ufffd" not in text for text in texts)


def test_it_stands_with_every_other_knob():
    knobs = dict(no_repeat_ngram=1, repetition_penalty=1.5, min_tokens=5, top_p=0.5, min_p=0.1, temperature=0.5)
    for name, tokenizer in TOKENIZERS.items():
        for text in written(tokenizer, alphabet="[і]", tokens=60, seed=2, **knobs)[0]:
            assert "\ufffd" not in text and all(c == "і" or c in "\n\t" or not c.isalpha() for c in text), name
        for text in written(tokenizer, alphabet="[і]", tokens=30, temperature=0.0, seed=2)[0]:
            assert "\ufffd" not in text and stray(text, "uk") == []


# ---- the mask against its plain twin ----

SPEC = "[бвґі白😀]"
ALLOWED = parse(SPEC) | shared()
ENCODED = [c.encode() for c in ALLOWED]


@cache
def spells(text):
    """Whether bytes are allowed characters, and then at most the beginning of one."""
    rest = text[len(text) - unfinished(text) :]
    try:
        whole = text[: len(text) - len(rest)].decode()
    except UnicodeDecodeError:
        return False
    return ALLOWED.issuperset(whole) and (not rest or any(one.startswith(rest) for one in ENCODED))


@cache
def finishes(name, state, left):
    """Whether some `left` tokens or fewer, tried one after the other, finish the bytes."""
    if not state:
        return True
    later = (state + p for p in set(TOKENIZERS[name].pieces) if p and left and spells(state + p))
    return any(finishes(name, s[len(s) - unfinished(s) :], left - 1) for s in later)


@pytest.mark.parametrize("name", ["bpe", "across", "byte"])
@pytest.mark.parametrize("left", [1, 2, 3, 9])
def test_the_mask_is_what_trying_every_token_finds(name, left):
    tokenizer = TOKENIZERS[name]
    alphabet = Alphabet(SPEC, tokenizer)
    states = {b""} | {c.encode()[:n] for c in "бві白" for n in range(1, len(c.encode()))}
    for state in states:
        if not finishes(name, state, min(left, 3)):
            continue  # never reached
        mask = alphabet.forbidden(state, left, torch.device("cpu"))
        for i, piece in enumerate(tokenizer.pieces):
            text = state + piece
            later = text[len(text) - unfinished(text) :]
            plain = bool(piece) and spells(text) and finishes(name, later, min(left - 1, 3))
            if i in tokenizer.ends:
                plain = not state
            assert bool(mask[i]) == (not plain), (state, piece, left)


@given(text=st.text(st.sampled_from("aїґ白😀 "), max_size=4), data=st.data())
def test_a_piece_is_cut_into_what_it_is(text, data):
    raw = text.encode()
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
    head, middle, tail = cut(raw[start:end])
    assert head + middle.encode() + tail == raw[start:end]
    assert len(head) <= 3 and len(tail) <= 3 and middle in text


@pytest.mark.parametrize("piece", [b"\xffa", b"a\xc0b", b"\xed\xa0\x80", b"\xe7\xe7", b"a\x80"])
def test_what_is_no_utf8_is_cut_off(piece):
    assert cut(piece)[1] is None


# ---- what may be asked for ----


def test_a_list_of_scripts_languages_and_characters():
    allowed = parse("Greek, uk ,[№€],\"'\", 'ö,'") | shared()
    assert {"λ", "ї", "Ґ", "№", "€", "'", "ö", ",", " ", "\n", "7", "—", "«"} <= allowed
    assert not {"ы", "q", "Q", "ä", "白", "，", "😀", "\0"} & allowed


def test_scripts_bring_the_marks_and_the_punctuation_they_are_written_with():
    assert "\u0301" in parse("Cyrillic") and {"，", "。", "「"} <= parse("Han") and "，" not in parse("Cyrillic")
    assert "😀" in parse("Common") and "ß" in parse("de") and "SS" not in parse("de")


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_language_is_a_set_of_letters_of_one_script(code):
    letters = [c for c in parse(code) if c.isalpha() and not c.isascii()]
    script = {"el": "Greek"}.get(code, "Cyrillic" if code in ("be", "bg", "ru", "sr", "uk") else "Latin")
    assert all(regex.match(rf"\p{{scx={script}}}", c) for c in letters)
    assert len(set(LANGUAGES[code])) == len(LANGUAGES[code])


@pytest.mark.parametrize(
    "spec, says",
    [
        ("Cyrilic", "did you mean Cyrillic?"),
        ("абв", "characters stand in brackets: [абв]"),
        ("ua", "no script or language 'ua'; languages: be, bg"),
        ("[абв", "is not a list"),
        ("Latin,,Greek", "is not a list"),
        (" ", "is empty"),
        ("'']", "is not a list"),
    ],
)
def test_what_is_not_understood_is_said_in_one_line(spec, says):
    with pytest.raises(InputError, match=regex.escape(says)) as error:
        parse(spec)
    assert "\n" not in str(error.value)


def test_a_vocabulary_without_any_such_letter_is_refused():
    only_latin = CharTokenizer("abc .")
    with pytest.raises(InputError, match="none of the 5 tokens is written in it"):
        Alphabet("Cyrillic", only_latin)
    Alphabet("Latin", only_latin)
    Alphabet("'.'", only_latin)
