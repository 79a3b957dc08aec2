"""BLOCK 1: text and ids are the same thing, at once or piece by piece, here and in the `tokenizers` library."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import DataConfig, InputError
from kobza.tokenizer import (
    BOS,
    EOT,
    BPETokenizer,
    CharTokenizer,
    StreamDecoder,
    byte_of_symbol,
    load_tokenizer,
    train_tokenizer,
)

SAMPLE = (
    "Реве та стогне Дніпр широкий, сердитий вітер завива; ґанок, їжак, єдність, її, ще й кобзар.\n"
    "If music be the food of love, play on; give me excess of it.\n"
    "日本語と中文、한국어。 👩‍👩‍👧‍👦 🇺🇦 👍🏽 naïve café e\u0301 \u200d\ufeff tab\tend\r\n"
)
TEXTS = st.text(st.characters(codec="utf-8")) | st.lists(
    st.sampled_from([*"іїєґІЇЄҐ' \n", "👩‍👩‍👧‍👦", "🇺🇦", "👍🏽", "日本", "語", "e\u0301", "Ġ", "<0x41>", EOT])
).map("".join)
SPECIALS = (EOT, BOS)

CHAR = CharTokenizer.train([SAMPLE], specials=SPECIALS)
BYTES = CharTokenizer.train(["abc дніпро\n"], "bytes", SPECIALS)  # most of SAMPLE is spelled as bytes
BPE = BPETokenizer.train([SAMPLE] * 3, 400, SPECIALS)
SPELLS_ALL = {"char+bytes": BYTES, "bpe": BPE}
ALL = SPELLS_ALL | {"char": CHAR}

each = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
each_that_spells_all = pytest.mark.parametrize("tokenizer", SPELLS_ALL.values(), ids=SPELLS_ALL)


# ---- there and back ----


@given(TEXTS)
def test_characters_round_trip(text):
    tokenizer = CharTokenizer.train([text])
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(set(text))


def test_characters_in_code_point_order():
    assert CharTokenizer.train(["ab", "ba\n"]).encode("ab\n").tolist() == [1, 2, 0]


@each_that_spells_all
@given(text=TEXTS)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode("utf-8"))


@each
def test_piece_bytes_add_up_to_the_text(tokenizer):
    ids = tokenizer.encode(SAMPLE)
    assert tokenizer.piece_bytes[ids].sum() == len(SAMPLE.encode("utf-8"))
    assert tokenizer.piece_bytes[tokenizer.eot_id] == tokenizer.piece_bytes[tokenizer.bos_id] == 0


# ---- characters outside the vocabulary ----


def test_unknown_characters_are_named_with_their_places():
    tokenizer = CharTokenizer.train(["ab\n"])
    with pytest.raises(InputError) as error:
        tokenizer.encode("ab\nbXa\nєX")
    assert "3 characters are not in the vocabulary of 3" in str(error.value)
    assert "'X' at line 2 column 2, 'є' at line 3 column 1" in str(error.value)
    assert "--unknown skip" in str(error.value)


def test_many_unknown_characters_are_counted():
    with pytest.raises(InputError, match="'v' at line 1 column 5 and 3 more"):
        CharTokenizer.train(["a"]).encode("zyxwvuts")


@given(TEXTS)
def test_skip_drops_and_bytes_spells(text):
    """Against a plain twin, character by character."""
    known = "ab іїє"
    skip, spell = CharTokenizer(known, "skip"), CharTokenizer(known, "bytes")
    assert skip.decode(skip.encode(text)) == "".join(c for c in text if c in known)
    twin = [[known.index(c)] if c in known else [len(known) + b for b in c.encode()] for c in text]
    assert spell.encode(text).tolist() == sum(twin, [])


@each_that_spells_all
def test_half_a_surrogate_pair_is_no_crash(tokenizer):
    """What Python makes of a bad byte in argv."""
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) in ("a?b", "a\ufffdb")


def test_half_a_surrogate_pair_is_an_unknown_character():
    with pytest.raises(InputError, match=r"'\\udcff' at line 1 column 2"):
        CharTokenizer("ab").encode("a\udcff")


# ---- streaming ----


@each_that_spells_all
@given(text=TEXTS)
def test_streaming_gives_the_same_text_and_never_half_a_character(tokenizer, text):
    stream, shown, fed = StreamDecoder(tokenizer), "", b""
    for i in tokenizer.encode(text):
        shown += stream.feed(i)
        fed += tokenizer.pieces[i]
        whole = fed.decode("utf-8", errors="ignore")  # all complete characters so far
        assert shown == whole
    assert shown + stream.flush() == text


@each
@given(data=st.data())
def test_streaming_any_ids_equals_decoding_them(tokenizer, data):
    """Also ids that spell no UTF-8, as a model may write them."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.feed(i) for i in ids) + stream.flush() == tokenizer.decode(ids)


def test_an_unfinished_character_is_flushed_as_a_replacement():
    stream = StreamDecoder(BYTES)
    assert stream.feed(BYTES.encode("є")[0]) == "" and stream.flush() == "\ufffd"


# ---- special tokens ----


@each_that_spells_all
def test_specials_are_never_read_out_of_a_text(tokenizer):
    ids = tokenizer.encode(f"a{EOT}b{BOS}")
    assert not {tokenizer.eot_id, tokenizer.bos_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == f"a{EOT}b{BOS}"
    assert tokenizer.decode([tokenizer.eot_id, tokenizer.bos_id]) == ""


@each
def test_show_names_specials_and_quotes_text(tokenizer):
    assert tokenizer.show(tokenizer.eot_id) == EOT and tokenizer.show(tokenizer.bos_id) == BOS
    assert tokenizer.show(int(tokenizer.encode("a")[0])) == "'a'"


def test_without_specials_there_are_none():
    assert CharTokenizer.train(["ab"]).eot_id is None and BPETokenizer.train(["ab"], 300).bos_id is None


# ---- BPE ----


def test_vocab_size_is_respected():
    for size in (300, 400):
        assert BPETokenizer.train([SAMPLE] * 3, size, SPECIALS).vocab_size == size
    poor = BPETokenizer.train(["abab"], 4096, SPECIALS)  # runs out of pairs
    assert 258 <= poor.vocab_size < 300 and max(poor.encode(SAMPLE)) < poor.vocab_size


def test_bpe_shortens():
    assert len(BPE.encode(SAMPLE)) < 0.7 * len(SAMPLE.encode())


def test_stand_ins_of_bytes_are_the_library_s():
    table = byte_of_symbol()
    assert sorted(table.values()) == list(range(256))
    assert set(table) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_train_tokenizer_follows_the_config():
    chars = train_tokenizer(["abc"], DataConfig(unknown="bytes"), [EOT])
    assert isinstance(chars, CharTokenizer) and chars.vocab_size == 3 + 256 + 1 and chars.eot_id == 259
    bpe = train_tokenizer([SAMPLE], DataConfig(tokenizer="bpe", vocab_size=300), [EOT])
    assert isinstance(bpe, BPETokenizer) and bpe.vocab_size == 300 and bpe.eot_id is not None


# ---- tokenizer.json ----


def same(ours, other):
    """Whether two tokenizers are equal in all that is seen from outside."""
    assert type(ours) is type(other)
    assert (ours.pieces, ours.specials, ours.vocab_size) == (other.pieces, other.specials, other.vocab_size)
    assert (ours.eot_id, ours.bos_id) == (other.eot_id, other.bos_id)
    assert ours.encode(SAMPLE).tolist() == other.encode(SAMPLE).tolist()
    return ours.to_json() == other.to_json()


@each
def test_save_then_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert same(tokenizer, load_tokenizer(tmp_path / "tokenizer.json"))


@given(TEXTS)
def test_save_then_load_any_characters(text):
    tokenizer = CharTokenizer.train([text + "a"])
    inner = json.loads(tokenizer.to_json())
    assert list(inner["model"]["vocab"]) == list(tokenizer.characters)


def test_bpe_without_merges_stays_bpe(tmp_path):
    """A text too short for any merge once came back as characters."""
    tokenizer = BPETokenizer.train(["a"], 257, [EOT])
    tokenizer.save(tmp_path / "tokenizer.json")
    assert same(tokenizer, load_tokenizer(tmp_path / "tokenizer.json"))


def test_unknown_is_chosen_on_loading(tmp_path):
    CharTokenizer.train(["ab"]).save(tmp_path / "tokenizer.json")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "tokenizer.json").encode("aXb")
    assert load_tokenizer(tmp_path / "tokenizer.json", "skip").encode("aXb").tolist() == [0, 1]


@each
def test_the_library_reads_our_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert inner.get_vocab_size(with_added_tokens=True) == tokenizer.vocab_size
    assert (inner.token_to_id(EOT), inner.token_to_id(BOS)) == (tokenizer.eot_id, tokenizer.bos_id)
    ids = inner.encode(SAMPLE, add_special_tokens=False).ids
    assert ids == tokenizer.encode(SAMPLE).tolist()
    assert inner.decode(ids) == tokenizer.decode(ids) == SAMPLE


@each_that_spells_all
@given(text=TEXTS)
def test_the_library_agrees_on_any_text(tokenizer, text):
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.encode_special_tokens = True
    ids = inner.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text).tolist()
    assert inner.decode(ids) == text


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": 3}', '{"model": {"vocab": {}, "merges": [["a", "b"]]}}']
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("tokenizer", [CHAR, BPE], ids=["char", "bpe"])
@pytest.mark.parametrize("key", ["model", "added_tokens"])
def test_a_file_with_a_part_missing_is_refused(tmp_path, tokenizer, key):
    content = json.loads(tokenizer.to_json())
    del content[key]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_holes_in_the_ids_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(CHAR.to_json().replace('"a": ', '"a": 9'))
    with pytest.raises(InputError, match="ids are not 0, 1, 2"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
