"""kobza tokens: every character is shown whole, rows lie side by side, counts are right; the advisor against plain twins."""

import io
import json
import math
import random
import sys
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_run import SMALL, no_pictures, verse  # noqa: F401 (no_pictures acts on every test here)

from kobza.cli import main
from kobza.config import ModelConfig
from kobza.describe.parts import total_parameters
from kobza.model import build, n_parameters
from kobza.recipes.tokens import pieces_table
from kobza.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer
from kobza.tokens.advisor import (
    MIN_ROW_TOKENS,
    Fit,
    candidates,
    embedding_share,
    measure_fit,
    thumb,
    trigram_loss,
    warnings,
)
from kobza.tokens.compare import Split, rows, visible
from kobza.tokens.scripts import PART, SCRIPTS, clusters, piece_script, script_of

FAMILY = "👩‍👩‍👧"
TEXT = f"Реве та стогне Дніпр, ґанок її!\nThe quick {FAMILY} fox 白日依山 e\u0301\r\n"
BPE = LibraryTokenizer.train([TEXT * 4 + verse(3000)], 400)
SHORT = [word.replace("steps=40", "steps=2") for word in SMALL]
KINDS = {"byte": ByteTokenizer(), "bpe": BPE, "char": CharTokenizer.train([TEXT], "bytes")}
each_kind = pytest.mark.parametrize("kind", KINDS)
texts = st.lists(
    st.sampled_from([*"аїґ xy\n白", FAMILY, "e\u0301", "Дніпр", "The", "🇺🇦"]), min_size=1, max_size=12
).map("".join)


# ---- scripts ----


def test_every_script_is_known_to_the_library_and_found():
    for name in SCRIPTS:
        some = regex.search(rf"\p{{Script={name}}}", ALL)
        assert some and script_of(some[0]) == name
    assert len(set(SCRIPTS)) == len(SCRIPTS) > 150


ALL = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x20000)]))


@pytest.mark.parametrize(
    "piece, script",
    [
        (" та", "Cyrillic"), ("the", "Latin"), ("e\u0301", "Latin"), (", 12\n", "Common"), (FAMILY, "Common"),
        ("白", "Han"), ("aб", "mixed"), ("λ!", "Greek"), (b"\xd1", PART), (b"a\xd1", PART), (b"\x97", PART),
    ],
)  # fmt: skip
def test_what_a_piece_is_written_in(piece, script):
    assert piece_script(piece if isinstance(piece, bytes) else piece.encode()) == script


# ---- one text, several tokenizers ----


@each_kind
@given(text=texts)
def test_each_character_is_shown_whole_and_its_parts_are_counted_through(kind, text):
    split = Split(kind, KINDS[kind], text)
    assert split.lossless and split.tokenizer.decode(split.ids.tolist()) == text
    seen = [part for k in range(len(split.ids)) for part in split.parts(k)]
    told = iter(seen)
    for character in clusters(text):
        name, part, of = next(told)
        assert (name, part) == (character, 1)
        assert [next(told) for _ in range(of - 1)] == [(character, k, of) for k in range(2, of + 1)]
    assert next(told, None) is None
    shown = split.show_span(range(len(split.ids)))
    assert "\ufffd" not in shown and all(visible(character) in shown for character in clusters(text))
    assert split.n_split == sum(part == 1 and of > 1 for _, part, of in seen)


def test_what_is_shown():
    assert Split("byte", KINDS["byte"], "ї a").show_span(range(4)) == "ї:1/2  2/2  ␣  a"
    assert Split("char", KINDS["char"], FAMILY).show_span(range(5)) == f"{FAMILY}:1/5  2/5  3/5  4/5  5/5"
    over = LibraryTokenizer.train(["白日" * 50], 262)  # merges reach over the border of the two
    shown = Split("bpe", over, "白日白日").show_span(range(len(Split("bpe", over, "白日白日").ids)))
    assert "\ufffd" not in shown and shown.count("白") >= 2
    assert Split("byte", KINDS["byte"], "\u200d").show(0).startswith("\\u200d:1/3")


def test_a_whole_character_and_a_part_of_one_in_a_token():
    class Two(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.pieces = [*self.pieces[:254], "aї".encode()[:2], "ї".encode()[1:] + b"b"]

        def encode(self, text, line=1, continues=False):
            return np.array([254, 255])

    split = Split("two", Two(), "aїb")
    assert split.lossless and split.show_span(range(2)) == "a+ї:1/2  ї:2/2+b" and split.n_split == 1


@given(text=texts, most=st.integers(1, 9))
def test_rows_lie_side_by_side_without_a_gap(text, most):
    splits = [Split(kind, tokenizer, text) for kind, tokenizer in KINDS.items()]
    whole, table = rows(splits, 10**6), rows(splits, most)
    assert "".join(stretch for stretch, _ in whole) == text and table == whole[: len(table)]
    assert 1 <= len(table) <= most
    for i, split in enumerate(splits):
        assert [k for _, spans in whole for k in spans[i]] == list(range(len(split.ids)))
        for stretch, spans in whole:
            assert b"".join(split.pieces[k] for k in spans[i]) == stretch.encode()


@each_kind
def test_counts_are_of_the_whole_text(kind):
    split = Split(kind, KINDS[kind], TEXT * 3)
    t = split.totals()
    plain = Counter(piece_script(KINDS[kind].pieces[i]) for i in KINDS[kind].encode(TEXT * 3))
    assert t["scripts"] == plain and sum(plain.values()) == t["tokens"] == len(split.ids)
    assert t["bytes_per_token"] == pytest.approx(len((TEXT * 3).encode()) / t["tokens"])
    assert t["kinds"] == len(set(split.ids.tolist()))


def test_what_is_lost_is_said():
    split = Split("char", CharTokenizer("abc ", "skip"), "ab ї c")
    assert not split.lossless and split.raw == b"ab  c" and split.totals()["lossless"] is False


# ---- how a vocabulary meets a text ----


def test_a_fit_is_counted():
    ids = np.array([0, 1, 2, 1, 2, 1, 2])
    fit = measure_fit(ids, 70, CharTokenizer("abcdefgh"), 0.25)
    assert (fit.vocab_size, fit.tokens, fit.rows_seen, fit.row_tokens) == (8, 70, 3 / 8, 70 / 8)
    assert (fit.bigrams, fit.bigram_count, fit.text_bytes) == (3, 2, 70)


@pytest.mark.parametrize("tied, pad", [(True, 0), (False, 64)])
def test_the_share_of_the_embeddings_is_the_models(tied, pad):
    config = ModelConfig(vocab_size=70, n_layer=1, n_head=2, n_embd=16, tied=tied, pad_vocab=pad, init="gpt2")
    model = build(config, 0)
    held = {id(p): p.numel() for p in (model.embed.weight, model.lm_head.weight)}
    assert embedding_share(config, total_parameters(config)) == pytest.approx(sum(held.values()) / n_parameters(model))


def fit_with(vocab_size, tokens, seen=1.0, share=0.3):
    return Fit(vocab_size, tokens, seen, 0, 0.0, share, 4 * tokens)


def test_a_vocabulary_beyond_its_text_is_warned_of():
    (line,) = warnings(fit_with(200_019, 209_951, seen=0.05))
    assert "200,019 rows meets 209,951 training tokens, 1.0 a row, and 5% of the rows ever occur" in line
    assert "--tokenizer bpe --vocab-size 4096" in line and "\n" not in line
    assert len(warnings(fit_with(200_019, 209_951, seen=0.05, share=0.95))) == 2
    assert warnings(fit_with(200_019, 10**8, seen=0.2)) and not warnings(fit_with(200_019, 10**8, seen=0.9))


@pytest.mark.parametrize(
    "fit", [fit_with(62, 987_000), fit_with(256, 10**5, 0.3), fit_with(320, 10**5, 0.4), fit_with(4096, 300_000)]
)
def test_what_is_well_is_silent(fit):
    assert warnings(fit) == []


def test_the_rule_of_thumb_follows_the_text():
    assert [thumb(n) for n in (1000, 940_000, 1_100_000, 120_000_000, 10**12)] == [512, 4096, 4096, 2**16, 2**16]


# ---- the recommendation ----


def plain_trigrams(train, V):
    """Interpolated Kneser-Ney, said with dictionaries -> p(a, b, c)."""

    def discount(counts):
        once, twice = (sum(n == k for n in counts.values()) for k in (1, 2))
        return once / (once + 2 * twice) if once else 0.0

    two, three = Counter(zip(train, train[1:], strict=False)), Counter(zip(train, train[1:], train[2:], strict=False))
    d2, d3 = discount(two), discount(three)

    def p1(c):
        return (sum(k[1] == c for k in two) + 0.5) / (len(two) + 0.5 * V)

    def level(counts, d, context, c, lower):
        n = sum(v for k, v in counts.items() if k[:-1] == context)
        kinds = sum(k[:-1] == context for k in counts)
        return max(counts[(*context, c)] - d, 0) / n + max(d * kinds / n, 1e-6) * lower if n else lower

    return lambda a, b, c: level(three, d3, (a, b), c, level(two, d2, (b,), c, p1(c)))


@given(seed=st.integers(0, 1000), V=st.integers(2, 6), n=st.integers(5, 60))
def test_trigrams_equal_their_plain_twin_and_are_probabilities(seed, V, n):
    rng = np.random.default_rng(seed)
    train, val = rng.integers(0, V, n), rng.integers(0, V, 12)
    p = plain_trigrams(train.tolist(), V)
    v = val.tolist()
    plain = -sum(math.log(p(*triple)) for triple in zip(v, v[1:], v[2:], strict=False)) / (len(v) - 2)
    assert trigram_loss(train, val, V) == pytest.approx(plain)
    whole = sum(math.exp(-trigram_loss(train, np.array([v[0], v[1], c]), V)) for c in range(V))
    assert whole == pytest.approx(1, abs=1e-4)


def best_for(text, budget=10**9):
    return min(candidates(text, 0.1), key=lambda one: one.bits_per_byte(budget)).option


def test_text_without_words_is_best_in_characters_and_words_are_best_whole():
    rng = random.Random(0)
    noise = "".join(rng.choice("abcdefghijklmnop") for _ in range(40_000))
    words = ["".join(rng.choice("abcdefghijklmnop") for _ in range(6)) for _ in range(60)]
    assert best_for(noise) in ("--tokenizer char", "--tokenizer byte")
    assert "bpe" in best_for(" ".join(rng.choice(words) for _ in range(8_000)))


def test_a_row_of_a_candidate_has_its_tokens_and_a_small_budget_costs_bits():
    found = candidates(verse(60_000), 0.1)
    assert all(one.n_train >= MIN_ROW_TOKENS * one.tokenizer.vocab_size for one in found[2:])
    assert [one.option for one in found[:2]] == ["--tokenizer byte", "--tokenizer char"]
    assert all(one.bits_per_byte(500) > one.bits_per_byte(10**6) == one.bits_per_byte(10**7) for one in found)


# ---- the command line ----


def said(capsys, *argv):
    assert main(["tokens", *argv]) == 0
    return capsys.readouterr().out


def test_a_text_a_file_and_standard_input_are_told_apart(tmp_path, capsys, monkeypatch):
    (tmp_path / "poem.txt").write_text("Реве")
    for text in (str(tmp_path / "poem.txt"), "Реве", "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Реве".encode())))
        found = json.loads(said(capsys, text, "--with", "byte,char", "--json"))
        assert (found["characters"], found["bytes"]) == (4, 8)
        byte, char = found["tokenizers"]
        assert (byte["name"], byte["tokens"], byte["split_characters"]) == ("byte", 8, 4)
        assert [one["text"] for one in char["shown"]] == list("Реве") and char["scripts"] == {"Cyrillic": 4}
        assert byte["shown"][1]["characters"] == [{"character": "Р", "part": 2, "of": 2}]


def test_the_table_shows_pieces_ids_and_counts(capsys):
    out = said(capsys, "її [b]їx[/b] " * 30, "--with", "byte,bpe", "--vocab-size", "300", "--first", "3")
    assert "ї:1/2  2/2" in out and "209 151" in out and "... and so on" in out and "part of a character" in out
    assert "\ufffd" not in out and "300 kinds" not in out  # so short a text has not so many pairs


def test_brackets_in_a_piece_are_no_markup(capsys):
    class Whole(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.pieces = [b"[b]", *self.pieces[1:]]

        def encode(self, text, line=1, continues=False):
            return np.array([0])

    split = Split("[x]", Whole(), "[b]")
    Console(width=60).print(pieces_table([split], rows([split], 9)))
    out = capsys.readouterr().out
    assert "[b]" in out and "[x]" in out


def test_a_run_is_compared_and_its_unknown_letters_are_lost(text, tmp_path, capsys):
    assert main(["train", text, "--out", str(tmp_path / "run"), *SHORT]) == 0
    capsys.readouterr()
    found = json.loads(said(capsys, "ba їx", "--with", f"{tmp_path / 'run'},char", "--json"))["tokenizers"]
    assert [one["lossless"] for one in found] == [False, True] and found[0]["tokens"] < 5
    assert "does not give the text back" in said(capsys, "ba їx", "--with", str(tmp_path / "run"))


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "no text"),
        (["no-such.txt"], "no-such.txt: no such file"),
        (["a", "--with", ","], "--with is empty"),
        (["a", "--with", "o200k"], "did you mean o200k_base"),
        (["a", "--with", "char", "--vocab-size", "300"], "--vocab-size 300 has no effect"),
        (["a", "--first", "0"], "--first is 0"),
        (["a", "--model", "tiny"], "no effect without --fit"),
        (["a", "--fit", "--first", "3"], "no effect with --fit"),
        (["a" * 100, "--fit"], "2,000 or more"),
        (["a" * 3000, "--fit", "--model", "tinny"], "did you mean tiny"),
        ([""], "the text is empty"),
    ],
)
def test_what_cannot_be_done_is_one_line(argv, says, capsys):
    assert main(["tokens", *argv]) == 2
    complaint = capsys.readouterr().err
    assert says in complaint and complaint.count("\n") == 1


def test_the_fit_of_a_text_and_a_model(tmp_path, capsys):
    path = tmp_path / "verse.txt"
    path.write_text(verse(30_000))
    found = json.loads(said(capsys, str(path), "--fit", "--model", "tiny", "--json"))
    assert found["budget_tokens"] == 300 * 32 * 64 and found["warnings"] == []
    best = min(found["tokenizers"], key=lambda one: one["bits_per_byte"])
    assert found["recommended"]["equal_steps"] == best["tokenizer"]
    out = said(capsys, str(path), "--fit", "--model", "tiny", "--with", "bpe", "--vocab-size", "3000")
    assert "best at equal steps" in out and "warning" in out and "rows meets" in out


def test_what_would_be_warned_of_is_never_recommended(tmp_path, capsys):
    (tmp_path / "verse.txt").write_text(verse(60_000))
    (tmp_path / "wide.toml").write_text("[model]\nn_layer = 1\nn_head = 2\nn_embd = 16\nn_ff = 8\n")
    picks = []
    for model in ("tiny", str(tmp_path / "wide.toml")):
        found = json.loads(said(capsys, str(tmp_path / "verse.txt"), "--fit", "--model", model, "--json"))
        (pick,) = [one for one in found["tokenizers"] if one["tokenizer"] == found["recommended"]["equal_steps"]]
        assert pick["embedding_share"] <= 0.9
        picks.append(pick["vocab_size"])
    assert picks[1] < picks[0]


def test_training_warns_of_a_vocabulary_beyond_its_text_and_else_says_nothing(tmp_path, capsys):
    rng, text = random.Random(0), str(tmp_path / "words.txt")
    words = ("".join(rng.choice("abcdefghijklmnop") for _ in range(5)) for _ in range(3000))
    (tmp_path / "words.txt").write_text(" ".join(words))
    assert main(["train", text, "--out", str(tmp_path / "a"), *SHORT]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["train", text, "--out", str(tmp_path / "b"), *SHORT, "--tokenizer=bpe", "--vocab-size=2000"]) == 0
    out = capsys.readouterr().out
    assert "warning   a vocabulary of 2,000 rows meets" in out and out.count("rows meets") == 1
    assert main(["describe", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "nats a token" in out and "bits a byte at step 2" in out


def test_an_alphabet_holds_for_every_way_to_generate(text, tmp_path, capsys, monkeypatch):
    run = str(tmp_path / "run")
    assert main(["train", text, "--out", run, *SHORT, "--tokenizer=bpe", "--vocab-size=300"]) == 0
    capsys.readouterr()
    for more in ([], ["--samples", "2"], ["--json"], ["--show-probabilities"]):
        argv = ["generate", run, "--prompt", "ba", "--tokens", "30", "--temperature", "3", "--top-k", "0", *more]
        assert main([*argv, "--alphabet", "Greek"]) == 0
        out = capsys.readouterr().out
        new = (
            json.loads(out)["samples"][0]["text"]
            if "--json" in more
            else out.rpartition("\nba")[2]
            if more
            else out[2:]
        )
        assert new.strip() and not regex.search(r"[\p{L}--\p{Greek}]|\ufffd", new, flags=regex.V1), new
    assert main(["generate", run, "--alphabet", "Grek"]) == 2
    assert "did you mean Greek?" in capsys.readouterr().err
    lines = iter(["ba", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", run, "--alphabet", "[λ]", "--tokens", "20", "--temperature", "3"]) == 0
    answer = capsys.readouterr().out.partition("\n")[2]
    assert answer.strip() and not regex.search(r"[\p{L}--[λ]]|\ufffd", answer, flags=regex.V1)
