"""Text -> tokens -> batches: every kind of file, every kind of damage, and an order that resumes anywhere."""

import csv
import gzip
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kobza.data
from kobza.config import DataConfig, InputError
from kobza.data import (
    Batches,
    Documents,
    Tokens,
    bytes_per_token,
    eval_batches,
    load_corpus,
    overlap,
    prepare,
    token_dtype,
)
from kobza.tokenizer import CharTokenizer

SONG = "Реве та стогне Дніпр широкий,\nСердитий вітер завива,\n«Додолу» верби гне високі. 🌊\n" * 5
PARTS = ["перший, з комою", 'другий "у лапках"', "третій\nу два рядки", "four"]


def write(path, content):
    """Write text or bytes, gzipped where the name says so."""
    raw = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": i, field: t}, ensure_ascii=bool(i % 2)) + "\n" for i, t in enumerate(texts))


def table(texts, field="text"):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([["id", field], *([i, t] for i, t in enumerate(texts))])
    return out.getvalue()


def texts_of(paths, field="text"):
    return ["".join(blocks) for _, blocks in Documents(paths, field)]


def stdin(monkeypatch, raw):
    monkeypatch.setattr(kobza.data.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw)))


def prepared(folder, paths, context=4, **config):
    """(tokenizer, corpus, all ids) of a text."""
    config = DataConfig(**config)
    tokenizer = prepare(Documents(paths, config.text_field), config, folder)
    corpus = load_corpus(folder, context)
    return tokenizer, corpus, np.concatenate([corpus.train.array(), corpus.val.array()])


# ---- kinds of files ----


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".unheard"])
def test_plain_text(tmp_path, suffix, gz):
    assert texts_of([write(tmp_path / f"a{suffix}{gz}", SONG)]) == [SONG]


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("field", ["text", "вірш"])
@pytest.mark.parametrize("kind, make", [("jsonl", jsonl), ("csv", table)])
def test_records_are_documents(tmp_path, kind, make, field, gz):
    path = write(tmp_path / f"a.{kind}{gz}", make(PARTS, field))
    assert texts_of([path], field) == PARTS


def test_standard_input(monkeypatch):
    stdin(monkeypatch, SONG.encode())
    documents = Documents(["-"])
    assert ["".join(blocks) for _, blocks in documents] == [SONG]
    assert "".join(documents.blocks()) == SONG  # a second pass, though the stream is spent


def test_a_folder_is_searched_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "2.md", "two")
    write(tmp_path / "a.txt.gz", "one")
    write(tmp_path / "c.csv", table(["three", "four"]))
    write(tmp_path / "d.jsonl.gz", jsonl(["five"]))
    write(tmp_path / "picture.png", b"\x89PNG\0")
    assert texts_of([str(tmp_path)]) == ["one", "two", "three", "four", "five"]


def test_folder_without_text(tmp_path):
    write(tmp_path / "picture.png", b"\x89PNG\0")
    with pytest.raises(InputError, match=r"no text in this folder.*\.txt \.md \.jsonl \.csv.*\.gz"):
        Documents([str(tmp_path)])


def test_missing_file():
    with pytest.raises(InputError, match="nowhere.txt: no such file or folder"):
        Documents(["nowhere.txt"])


def test_line_ends_and_byte_order_mark(tmp_path):
    assert texts_of([write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n")]) == ["one\ntwo\rthree\n\n"]
    assert texts_of([write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}')]) == ["x", "y"]
    assert texts_of([write(tmp_path / "c.csv", b"\xef\xbb\xbftext,n\r\nx,1\r\n\r\ny,2")]) == ["x", "y"]


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from("\r\nіє🌊")),
    block=st.integers(3, 9),
)
@example(text="ab\r\ncd", block=3)  # a line end across the border, and no other in the block
@example(text="aaі🌊", block=3)
def test_blocks_do_not_show(text, block):
    """Characters, line ends and the mark across the border of two reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kobza.data, "BLOCK_BYTES", block)
        raw = text.encode("utf-8")
        blocks = list(kobza.data.text_blocks("x", io.BytesIO(raw)))
    assert "".join(blocks) == text.removeprefix("\ufeff").replace("\r\n", "\n")


@pytest.mark.parametrize("block", [3, 7, 64])
def test_records_across_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(kobza.data, "BLOCK_BYTES", block)
    assert texts_of([write(tmp_path / "a.jsonl", jsonl(PARTS))]) == PARTS
    assert texts_of([write(tmp_path / "a.csv", table(PARTS))]) == PARTS


# ---- damage ----


@pytest.mark.parametrize("block", [3, 16, 1 << 20])
@pytest.mark.parametrize("head", ["", "plain\n", SONG, "і" * 101])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe9t\xe9", b"\xd1", b"\xf0\x9f\x8c"])
def test_bad_utf8_names_file_byte_and_remedy(tmp_path, monkeypatch, block, head, bad):
    monkeypatch.setattr(kobza.data, "BLOCK_BYTES", block)
    path = write(tmp_path / "a.txt", head.encode() + bad)
    with pytest.raises(InputError) as error:
        texts_of([path])
    assert f"{path}: byte 0x{bad[0]:02x} at offset {len(head.encode())} is not UTF-8" in str(error.value)
    assert "iconv" in str(error.value)


def test_bad_utf8_inside_gzip(tmp_path):
    with pytest.raises(InputError, match="0xff at offset 3 "):
        texts_of([write(tmp_path / "a.txt.gz", b"abc\xff")])


@pytest.mark.parametrize("raw", [b"text\0more", b"\x89PNG\r\n\0\0\0", "utf-16".encode("utf-16")])
def test_binary_files(tmp_path, raw):
    with pytest.raises(InputError, match="a binary file, not text"):
        texts_of([write(tmp_path / "a.txt", raw)])


@pytest.mark.parametrize(
    "spoil", [lambda raw: raw[:-9], lambda raw: raw[:12] + b"\xff\xff\xff" + raw[15:], lambda _: b"no"]
)
def test_damaged_gzip(tmp_path, spoil):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(spoil(gzip.compress(SONG.encode())))
    with pytest.raises(InputError, match=r"a\.txt\.gz: cannot be read"):
        texts_of([str(path)])


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": ', "line 2: not JSON"),
        ("[1]", "line 2: a list, not an object"),
        ('{"txet": "x"}', r"line 2: no field 'text'; did you mean txet\?.*--text-field"),
        ('{"text": 3}', "line 2: field 'text' is not a string"),
        (r'{"text": "\ud83c"}', "line 2: field 'text'.*surrogate"),
    ],
)
def test_bad_records(tmp_path, line, words):
    with pytest.raises(InputError, match=words):
        texts_of([write(tmp_path / "a.jsonl", jsonl(["good"]) + line + "\n")])


def test_bad_tables(tmp_path):
    with pytest.raises(InputError, match=r"a\.csv: no column 'text'; did you mean texts\?.*--text-field"):
        texts_of([write(tmp_path / "a.csv", table(PARTS, "texts"))])
    with pytest.raises(InputError, match=r"e\.csv: no column 'text'"):
        texts_of([write(tmp_path / "e.csv", "")])
    with pytest.raises(InputError, match=r"m\.csv line 2: not CSV"):
        texts_of([write(tmp_path / "m.csv", "text,n\none\rtwo,3\n")])


def test_a_row_without_the_column_is_no_document(tmp_path):
    assert texts_of([write(tmp_path / "a.csv", "n,text\n1,x\n2\n3,\n4,y,z\n")]) == ["x", "y"]


def test_unknown_characters_name_the_file(tmp_path):
    path = write(tmp_path / "a.txt", "ab\nXb")
    with pytest.raises(InputError, match=r"a\.txt: 1 character is.*'X' at line 2 column 1"):
        prepare(Documents([path]), DataConfig(), tmp_path / "t", CharTokenizer("ab\n"))


def test_empty_text(tmp_path):
    with pytest.raises(InputError, match="the text is empty: 0 tokens"):
        prepared(tmp_path / "t", [write(tmp_path / "a.txt", "")])


def test_too_short_text_names_the_numbers(tmp_path):
    path = write(tmp_path / "a.txt", "x" * 100)
    with pytest.raises(InputError, match=r"100 tokens give 90 to train and 10 to validate.*max_seq_len 10.*below 10"):
        prepared(tmp_path / "t", [path], context=10)
    _, corpus, _ = prepared(tmp_path / "u", [path], context=9)  # the remedy it named
    assert next(Batches(corpus.val, 1, 9, seed=0))[0].shape == (1, 9)


# ---- tokens ----


def test_tokens_spell_the_text(tmp_path):
    tokenizer, corpus, ids = prepared(tmp_path / "t", [write(tmp_path / "a.txt", SONG)])
    assert tokenizer.decode(ids) == SONG and tokenizer.eot_id is None
    assert corpus.index["n_bytes"] == len(SONG.encode()) and corpus.index["n_tokens"] == len(SONG)
    assert len(corpus.val) == int(0.1 * len(SONG)) and corpus.index["n_documents"] == 1


def test_documents_are_parted_only_where_there_are_several(tmp_path):
    tokenizer, corpus, ids = prepared(tmp_path / "t", [write(tmp_path / "a.jsonl", jsonl(PARTS))])
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    assert [tokenizer.decode(part) for part in np.split(ids, ends + 1)] == [*PARTS, ""]
    assert corpus.index["n_documents"] == 4 and corpus.index["n_bytes"] == sum(len(p.encode()) for p in PARTS)


def test_a_beginning_token_on_request(tmp_path):
    paths = [write(tmp_path / f"{i}.txt", part) for i, part in enumerate(PARTS)]
    tokenizer, _, ids = prepared(tmp_path / "t", paths, bos=True)
    twin = [[tokenizer.bos_id, *tokenizer.encode(part), tokenizer.eot_id] for part in PARTS]
    assert ids.tolist() == sum(twin, [])
    alone, _, ids = prepared(tmp_path / "u", [write(tmp_path / "a.txt", SONG)], bos=True)
    assert alone.eot_id is None and ids[0] == alone.bos_id and (ids == alone.bos_id).sum() == 1


@pytest.mark.parametrize(
    "size, name", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_width_follows_the_vocabulary(size, name):
    assert token_dtype(size) == np.dtype(name)
    assert np.array([size - 1]).astype(token_dtype(size))[0] == size - 1


def test_width_on_disk(tmp_path):
    narrow = prepared(tmp_path / "a", [write(tmp_path / "a.txt", SONG)])[1]
    many = "".join(chr(0x4E00 + i) for i in range(300)) * 2
    wide, corpus, ids = prepared(tmp_path / "b", [write(tmp_path / "b.txt", many)])
    assert narrow.index["dtype"] == "uint8" and (tmp_path / "a" / "00000.bin").stat().st_size == len(SONG)
    assert corpus.index["dtype"] == "uint16" and (tmp_path / "b" / "00000.bin").stat().st_size == 2 * len(many)
    assert wide.decode(ids) == many


@pytest.mark.parametrize("shard", [7, 64, 420])
def test_many_shards_equal_one(tmp_path, monkeypatch, shard):
    path = write(tmp_path / "a.txt", SONG)
    _, one, ids = prepared(tmp_path / "one", [path], context=8)
    monkeypatch.setattr(kobza.data, "SHARD_TOKENS", shard)
    monkeypatch.setattr(kobza.data, "BLOCK_BYTES", 50)
    _, many, ids_many = prepared(tmp_path / "many", [path], context=8)
    assert len(many.train.shards) == -(-len(SONG) // shard) and max(map(len, many.train.shards)) <= shard
    assert ids.tolist() == ids_many.tolist() and one.index["sha256"] == many.index["sha256"]
    for tokens, others in ((one.train, many.train), (one.val, many.val)):
        starts = np.arange(len(tokens) - 8)
        assert (tokens.windows(starts, 9) == others.windows(starts, 9)).all()
        assert tokens.array(13).tolist() == others.array(13).tolist()


@pytest.mark.parametrize("config", [{}, {"tokenizer": "bpe", "vocab_size": 300}])
def test_a_text_too_big_to_keep_gives_the_same_tokens(tmp_path, monkeypatch, config):
    paths = [
        write(tmp_path / "a.txt", SONG),
        write(tmp_path / "b.csv.gz", table(PARTS)),
        write(tmp_path / "c.md", SONG),
    ]
    kept, _, ids = prepared(tmp_path / "kept", paths, **config)
    monkeypatch.setattr(kobza.data, "KEEP_BYTES", 10)
    documents = Documents(paths)
    read, _, ids_read = prepared(tmp_path / "read", paths, **config)
    list(documents)
    assert documents._kept is None  # or this test compares a thing with itself
    assert ids.tolist() == ids_read.tolist() and kept.to_json() == read.to_json()


def test_bytes_per_token(tmp_path):
    tokenizer, corpus, ids = prepared(tmp_path / "t", [write(tmp_path / "a.txt", SONG)])
    n = len(corpus.train)
    assert bytes_per_token(corpus.train, tokenizer) == pytest.approx(len(tokenizer.decode(ids[:n]).encode()) / n)


# ---- overlap of training and validation text ----


def in_one_shard(ids):
    return Tokens((np.asarray(ids),), 0, len(ids))


def test_overlap_finds_what_was_planted():
    generator = np.random.default_rng(0)
    train, val = generator.integers(65, size=20_000), generator.integers(65, size=6_400)
    assert overlap(in_one_shard(train), in_one_shard(val)) == 0
    val[100:740] = train[777:1417]  # holds whole the 9 windows of 64 that begin at 128, 192, ... 640
    assert overlap(in_one_shard(train), in_one_shard(val)) == 9 / 100
    assert overlap(in_one_shard(train), in_one_shard(train[5_000:8_000])) == 1


def test_overlap_of_short_texts_is_none():
    assert overlap(in_one_shard(np.zeros(63)), in_one_shard(np.zeros(500))) == 0


def test_overlap_hash_is_the_polynomial():
    """Against a plain twin: h = sum of (id + 1) p^k over the 64 tokens, mod 2^64."""
    ids, p = np.random.default_rng(1).integers(50_000, size=70), 0x9E3779B97F4A7C15
    twin = [sum((int(i) + 1) * pow(p, k, 2**64) for k, i in enumerate(ids[s : s + 64])) % 2**64 for s in range(7)]
    assert kobza.data._window_hashes(ids).tolist() == twin


# ---- batches ----


def counted(n):
    """Tokens 0, 1, ... n - 1: each is its own place."""
    return in_one_shard(np.arange(n, dtype=np.uint32))


def take(batches, n):
    return [torch.stack(next(batches)) for _ in range(n)]


@given(n=st.integers(30, 300), length=st.integers(1, 25), micro_batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_epoch_is_every_window_once(n, length, micro_batch, seed):
    batches = Batches(counted(n), micro_batch, length, seed)
    first, second = (len(batches._order(epoch)) for epoch in (0, 1))
    starts: list[int] = []
    while len(starts) < first + second:
        inputs, targets = next(batches)
        assert inputs.shape == (micro_batch, length) and inputs.dtype == torch.int64
        assert (targets == inputs + 1).all()  # the token that follows each
        assert (inputs == inputs[:, :1] + torch.arange(length)).all() and targets.max() < n
        starts += inputs[:, 0].tolist()
    for epoch in (starts[:first], starts[first : first + second]):
        ordered = sorted(epoch)
        assert ordered == list(range(ordered[0], n - length, length)) and ordered[0] < length


def test_the_order_is_the_seed_s():
    first = take(Batches(counted(500), 4, 10, seed=1), 30)
    again = take(Batches(counted(500), 4, 10, seed=1), 30)
    other = take(Batches(counted(500), 4, 10, seed=2), 30)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))
    epochs = Batches(counted(500), 1, 10, seed=1)
    assert not np.array_equal(epochs._order(0), epochs._order(1))


@given(n=st.integers(20, 120), length=st.integers(1, 12), micro_batch=st.integers(1, 7), done=st.integers(0, 40))
def test_resuming_anywhere_goes_on_identically(n, length, micro_batch, done):
    seed = n % 5
    batches = Batches(counted(n), micro_batch, length, seed)
    take(batches, done)
    state = json.loads(json.dumps(batches.state_dict()))  # as a checkpoint holds it
    resumed = Batches(counted(n), micro_batch, length, seed)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, take(batches, 12), take(resumed, 12)))
    assert batches.state_dict() == resumed.state_dict()


def test_resuming_under_another_seed_is_refused():
    with pytest.raises(AssertionError, match="order of seed 1, not 2"):
        Batches(counted(50), 2, 5, seed=2).load_state_dict(Batches(counted(50), 2, 5, seed=1).state_dict())


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_one_order(world):
    whole = take(Batches(counted(203), 8, 10, seed=3), 12)
    ranks = [Batches(counted(203), 8 // world, 10, seed=3, rank=r, world=world) for r in range(world)]
    for batch in whole:
        assert torch.equal(torch.cat([torch.stack(next(rank)) for rank in ranks], dim=1), batch)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("most, n_windows", [(10**9, 9), (45, 4), (1, 1)])
def test_eval_batches_are_the_first_windows_in_order(batch, most, n_windows):
    pairs = eval_batches(counted(100), batch, 10, most, torch.device("cpu"))
    inputs, targets = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert torch.equal(inputs, torch.arange(10 * n_windows).view(-1, 10)) and torch.equal(targets, inputs + 1)
    assert max(len(i) for i, _ in pairs) <= batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tokens_on_a_gpu_give_the_same_batches():
    cpu, gpu = (Batches(counted(300), 4, 10, 0, torch.device(d)) for d in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(take(cpu, 50), take(gpu, 50), strict=True))
