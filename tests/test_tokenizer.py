"""BLOCK 1: text and ids are the same thing, at once or piece by piece, here and in the `tokenizers` library."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import kobza.data
import kobza.tokenizer
from kobza.config import DataConfig, InputError
from kobza.data import Documents, prepare
from kobza.tokenizer import (
    BOS,
    EOT,
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    StreamDecoder,
    byte_of_symbol,
    chunks,
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

# ---- files as others write them ----

SPACE = "▁"


def sentencepiece_like(inner, trainer, fallback=True):
    """A tokenizer in the manner of Llama 2's file: a space put before the text, byte fallback, <s> before the ids."""
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    digits = "<0x0123456789ABCDEF>"  # with these in the vocabulary no text that says <0x41> is taken for the byte
    inner.train_from_iterator([line + "\n" for line in [*SAMPLE.split("\n"), digits]] * 3, trainer)
    begin = [("<s>", inner.token_to_id("<s>"))]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=begin)
    content = json.loads(inner.to_str())
    vocab, names = content["model"]["vocab"], [f"<0x{b:02X}>" for b in range(256)]
    if fallback and isinstance(vocab, dict):
        vocab |= {name: len(vocab) + i for i, name in enumerate(names)}
    elif fallback:
        vocab += [[name, -1000.0] for name in names]
    content["model"]["byte_fallback"] = fallback
    return json.dumps(content)


def llama_like():
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    return sentencepiece_like(inner, trainer)


def unigram_like(fallback=True):
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return sentencepiece_like(tokenizers.Tokenizer(models.Unigram()), trainer, fallback)


def bert_like():
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner.train_from_iterator(
        [SAMPLE] * 3, trainers.WordPieceTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return inner.to_str()


def t5_like():
    """Metaspace, which puts a space before only where there is none."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.normalizer = normalizers.NFKC()
    inner.train_from_iterator(
        [SAMPLE] * 3,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return inner.to_str()


CHAR = CharTokenizer.train([SAMPLE], specials=SPECIALS)
BYTES = CharTokenizer.train(["abc дніпро\n"], "bytes", SPECIALS)  # most of SAMPLE is spelled as bytes
BPE = LibraryTokenizer.train([SAMPLE] * 3, 400, SPECIALS)
LLAMA, UNIGRAM = LibraryTokenizer(llama_like()), LibraryTokenizer(unigram_like())
LOSSY = {"wordpiece": LibraryTokenizer(bert_like()), "metaspace": LibraryTokenizer(t5_like())}
LOSSY["unigram without bytes"] = LibraryTokenizer(unigram_like(fallback=False))
OURS = {"char": CHAR, "char+bytes": BYTES, "byte": ByteTokenizer(SPECIALS), "bpe": BPE}
SPELLS_ALL = {name: OURS[name] for name in ("char+bytes", "byte", "bpe")} | {"llama": LLAMA, "unigram": UNIGRAM}
ALL = OURS | SPELLS_ALL | LOSSY
LIBRARY = {name: tokenizer for name, tokenizer in ALL.items() if isinstance(tokenizer, LibraryTokenizer)}

each = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL)
each_of_ours = pytest.mark.parametrize("tokenizer", OURS.values(), ids=OURS)
each_of_the_library = pytest.mark.parametrize("tokenizer", LIBRARY.values(), ids=LIBRARY)
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
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode("utf-8")) + (len(tokenizer.prefix) if text else 0)


def test_which_kinds_give_every_text_back():
    assert {name for name, tokenizer in ALL.items() if tokenizer.lossless} == {*SPELLS_ALL, "char"}
    assert not CharTokenizer("ab", "skip").lossless


@each_of_ours
def test_piece_bytes_add_up_to_the_text(tokenizer):
    ids = tokenizer.encode(SAMPLE)
    assert tokenizer.piece_bytes[ids].sum() == len(SAMPLE.encode("utf-8"))
    assert tokenizer.piece_bytes[tokenizer.eot_id] == tokenizer.piece_bytes[tokenizer.bos_id] == 0


@given(TEXTS)
def test_bytes_are_their_own_ids(text):
    assert ByteTokenizer().encode(text).tolist() == list(text.encode("utf-8")) and ByteTokenizer().vocab_size == 256


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
        whole = fed.removeprefix(tokenizer.prefix).decode("utf-8", errors="ignore")  # all complete characters so far
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


@each
@given(data=st.data())
def test_streaming_a_continuation_keeps_its_space(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = StreamDecoder(tokenizer, continues=True)
    streamed = "".join(stream.feed(i) for i in ids) + stream.flush()
    assert (
        streamed
        == tokenizer.decode(ids, continues=True)
        == b"".join(tokenizer.pieces[i] for i in ids).decode(errors="replace")
    )


@each_that_spells_all
@given(text=TEXTS, at=st.integers(0, 20))
def test_a_text_in_two_parts_is_the_text(tokenizer, text, at):
    """What is encoded as going on from another text has no space of its own before it."""
    first, second = tokenizer.encode(text[:at]), tokenizer.encode(text[at:], continues=True)
    spelled = tokenizer.decode(first) + tokenizer.decode(second, continues=True)
    assert spelled == text
    if at and text:
        assert tokenizer.decode([*first, *second]) == text


def test_a_prefix_space_is_taken_away_once_and_only_at_the_beginning():
    ids = LLAMA.encode(" in  music").tolist()
    assert LLAMA.prefix == b" " and LLAMA.pieces[ids[0]].startswith(b" ")
    assert LLAMA.decode(ids) == " in  music" and LLAMA.decode(ids, continues=True) == "  in  music"
    stream = StreamDecoder(LLAMA, continues=True)  # as generate prints the ids after a prompt's
    word = next(i for i, piece in enumerate(LLAMA.pieces) if len(piece) > 1 and piece.startswith(b" "))
    text = LLAMA.pieces[word].decode()
    assert stream.feed(word) == text and StreamDecoder(LLAMA).feed(word) == text[1:]


# ---- special tokens ----


@each_that_spells_all
def test_specials_are_never_read_out_of_a_text(tokenizer):
    text = f"a{EOT}b{BOS}<s></s>"
    ids = tokenizer.encode(text)
    assert not set(tokenizer.specials.values()) & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eot_id, tokenizer.bos_id]) == ""


def test_beginning_and_end_are_those_the_file_says():
    assert (LLAMA.bos_id, LLAMA.eot_id) == (LLAMA.specials["<s>"], LLAMA.specials["</s>"])
    bert, t5 = LOSSY["wordpiece"], LOSSY["metaspace"]
    assert (bert.bos_id, bert.eot_id) == (bert.specials["[CLS]"], bert.specials["[SEP]"])
    assert (t5.bos_id, t5.eot_id) == (None, t5.specials["</s>"])


@each
def test_further_specials_take_the_next_ids(tokenizer):
    more = tokenizer.with_specials(["<|a|>", "<|b|>"])
    assert more.specials == tokenizer.specials | {"<|a|>": tokenizer.vocab_size, "<|b|>": tokenizer.vocab_size + 1}
    assert more.pieces == [*tokenizer.pieces, b"", b""] and type(more) is type(tokenizer)
    assert more.encode("love food").tolist() == tokenizer.encode("love food").tolist()
    if tokenizer is not CHAR:
        assert more.vocab_size - 2 not in more.encode("love <|a|>")


@each_of_ours
def test_show_names_specials_and_quotes_text(tokenizer):
    assert tokenizer.show(tokenizer.eot_id) == EOT and tokenizer.show(tokenizer.bos_id) == BOS
    assert tokenizer.show(int(tokenizer.encode("a")[0])) == "'a'"


def test_without_specials_there_are_none():
    assert CharTokenizer.train(["ab"]).eot_id is None and LibraryTokenizer.train(["ab"], 300).bos_id is None


# ---- BPE ----


def test_vocab_size_is_respected():
    for size in (300, 400):
        assert LibraryTokenizer.train([SAMPLE] * 3, size, SPECIALS).vocab_size == size
    poor = LibraryTokenizer.train(["abab"], 4096, SPECIALS)  # runs out of pairs
    assert 258 <= poor.vocab_size < 300 and max(poor.encode(SAMPLE)) < poor.vocab_size


def test_bpe_shortens():
    assert len(BPE.encode(SAMPLE)) < 0.7 * len(SAMPLE.encode())


def test_stand_ins_of_bytes_are_the_library_s():
    table = byte_of_symbol()
    assert sorted(table.values()) == list(range(256))
    assert set(table) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_training_equals_the_library_s(monkeypatch):
    """In one piece, and in chunks of which the library takes several at a time."""
    text = SAMPLE * 5 + "one\ntwo\n\n  three 4\n"
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([text], trainer)
    for size in (1, 7, 1 << 16):
        monkeypatch.setattr(kobza.tokenizer, "CHUNK", size)
        assert json.loads(LibraryTokenizer.train([text], 420).to_json())["model"] == json.loads(inner.to_str())["model"]


LINES = st.lists(st.sampled_from([*"їa1. \n\t'", "\n\n", " word", "слово", "\r\n", "don't", "  \n"]), max_size=60)


@given(text=LINES.map("".join), size=st.integers(1, 9))
def test_chunks_do_not_show(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kobza.tokenizer, "CHUNK", size)
        parts = list(chunks(text))
        ids = BPE.encode(text)
    assert "".join(parts) == text and BPE.cuts
    assert ids.tolist() == BPE.inner.encode(text, add_special_tokens=False).ids


def test_chunks_are_cut_where_they_can_be(monkeypatch):
    monkeypatch.setattr(kobza.tokenizer, "CHUNK", 2)
    assert list(chunks("ab\ncd.\n\nef\n\ng")) == ["ab", "\ncd.\n\nef", "\n\ng"]


@pytest.mark.parametrize("tokenizer", [BPE, LLAMA, UNIGRAM, OURS["byte"]], ids=["bpe", "llama", "unigram", "byte"])
def test_blocks_of_a_file_do_not_show(tmp_path, monkeypatch, tokenizer):
    """A long text is read in blocks; only the first begins a text, and no block's end is seen."""
    path, text = tmp_path / "a.txt", "a\n\n\n  b c\n   d.\n\n e\n" * 30
    path.write_text(text)
    monkeypatch.setattr(kobza.data, "BLOCK_BYTES", 16)
    documents = Documents([str(path)])
    assert len(list(documents.blocks())) > 10
    prepare(documents, DataConfig(), tmp_path / "t", tokenizer)
    index = json.loads((tmp_path / "t" / "index.json").read_text())
    ids = np.fromfile(tmp_path / "t" / "00000.bin", index["dtype"]).tolist()
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert ids == [*begin, *tokenizer.encode(text), tokenizer.eot_id]


def test_several_documents_are_parted_whatever_the_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n')
    given = ByteTokenizer()
    tokenizer = prepare(Documents([str(tmp_path / "a.jsonl")]), DataConfig(tokenizer="byte"), tmp_path / "t", given)
    assert given.eot_id is None and tokenizer.eot_id == 256
    assert np.fromfile(tmp_path / "t" / "00000.bin", np.uint16).tolist() == [*b"abc", 256, *b"def", 256]


def test_train_tokenizer_follows_the_config():
    chars = train_tokenizer(["abc"], DataConfig(unknown="bytes"), [EOT])
    assert isinstance(chars, CharTokenizer) and chars.vocab_size == 3 + 256 + 1 and chars.eot_id == 259
    raw = train_tokenizer(["abc"], DataConfig(tokenizer="byte"), [EOT])
    assert isinstance(raw, ByteTokenizer) and raw.vocab_size == 257 and raw.eot_id == 256
    with pytest.raises(InputError, match="o200k_base is not learned from a text"):
        train_tokenizer(["abc"], DataConfig(tokenizer="o200k_base"), [])
    bpe = train_tokenizer([SAMPLE], DataConfig(tokenizer="bpe", vocab_size=300), [EOT])
    assert isinstance(bpe, LibraryTokenizer) and bpe.vocab_size == 300 and bpe.eot_id is not None


# ---- any tokenizer.json ----


@each_of_the_library
@given(text=TEXTS)
def test_ids_are_the_library_s(tokenizer, text):
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.encode_special_tokens = True
    if type(inner.model) is models.Unigram:  # the library's takes a text that says <s> or <0x41> for that token
        assume(not any(name in text for name in (*tokenizer.specials, "<0x")))
    assert tokenizer.encode(text).tolist() == inner.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", [*LOSSY, "llama", "unigram", "bpe"])
@pytest.mark.parametrize("text", ["If music be the food of love, play on", "ґанок, їжак; excess of it.", "on"])
def test_decoding_is_the_library_s(name, text):
    tokenizer = ALL[name]
    ids = tokenizer.encode(text).tolist()
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert tokenizer.decode(ids) == inner.decode(ids)


def changed(tokenizer, change):
    """A tokenizer of the same file after change(content)."""
    content = json.loads(tokenizer.to_json())
    change(content)
    return LibraryTokenizer(json.dumps(content))


def token(i, content, special):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special, **flags}


def test_added_tokens_that_are_not_special_are_text():
    n = BPE.vocab_size
    more = changed(BPE, lambda content: content["added_tokens"].extend([token(n, "\n\nїжак", False)]))
    assert more.pieces[n] == "\n\nїжак".encode() and more.specials == BPE.specials
    ids = more.encode("a\n\nїжак b")
    assert n in ids.tolist() and more.decode(ids) == "a\n\nїжак b" and more.lossless


def test_an_added_token_that_takes_spaces_away_is_lossy():
    def change(content):
        content["added_tokens"].append(token(BPE.vocab_size, "<mask>", False) | {"lstrip": True})

    assert not changed(BPE, change).lossless


def test_holes_in_the_ids_are_empty_pieces():
    """As between the ranks of o200k_base and its special tokens."""

    def change(content):
        content["model"]["vocab"]["<|end|>"] = BPE.vocab_size + 5
        content["added_tokens"].append(token(BPE.vocab_size + 5, "<|end|>", True))

    sparse = changed(BPE, change)
    assert sparse.vocab_size == BPE.vocab_size + 6 and sparse.specials["<|end|>"] == BPE.vocab_size + 5
    assert (
        sparse.pieces[BPE.vocab_size :] == [b""] * 6 and sparse.encode(SAMPLE).tolist() == BPE.encode(SAMPLE).tolist()
    )
    more = sparse.with_specials(["<|more|>"])
    assert more.specials["<|more|>"] == more.vocab_size - 1 == BPE.vocab_size + 6 == more.inner.token_to_id("<|more|>")


def test_truncation_and_padding_of_a_file_are_not_ours():
    inner = tokenizers.Tokenizer.from_str(BPE.to_json())
    inner.enable_truncation(5)
    inner.enable_padding(length=100)
    assert LibraryTokenizer(inner.to_str()).encode(SAMPLE).tolist() == BPE.encode(SAMPLE).tolist()


@pytest.mark.parametrize("name", ["wordpiece", "metaspace", "unigram without bytes"])
def test_a_prompt_that_says_nothing_is_not_empty(name):
    assert len(ALL[name].encode(ALL[name].line_start())) >= 1


# ---- tokenizer.json ----


def same(ours, other):
    """Whether two tokenizers are equal in all that is seen from outside."""
    assert type(ours) is type(other)
    assert (ours.pieces, ours.specials, ours.vocab_size) == (other.pieces, other.specials, other.vocab_size)
    assert (ours.eot_id, ours.bos_id) == (other.eot_id, other.bos_id)
    assert ours.encode(SAMPLE).tolist() == other.encode(SAMPLE).tolist()
    assert (ours.prefix, ours.lossless) == (other.prefix, other.lossless)
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
    tokenizer = LibraryTokenizer.train(["a"], 257, [EOT])
    tokenizer.save(tmp_path / "tokenizer.json")
    assert same(tokenizer, load_tokenizer(tmp_path / "tokenizer.json"))


def test_unknown_is_chosen_on_loading(tmp_path):
    CharTokenizer.train(["ab"]).save(tmp_path / "tokenizer.json")
    with pytest.raises(InputError):
        load_tokenizer(tmp_path / "tokenizer.json").encode("aXb")
    assert load_tokenizer(tmp_path / "tokenizer.json", "skip").encode("aXb").tolist() == [0, 1]


@each_of_ours
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
