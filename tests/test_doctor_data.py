"""doctor/data.py: each injected fault caught by its own code, no alarm on clean data, bounded on hostile files."""

import gzip
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kobza.config import InputError
from kobza.doctor import selftest
from kobza.doctor.finding import examine, exit_code
from kobza.doctor.mutations import data as proof
from kobza.doctor.mutations.specimens import folder
from kobza.doctor.training import data as area
from kobza.doctor.training.overlap import (
    counts_characters,
    covered,
    found_in,
    line_hashes,
    longest,
    runs,
    streamed,
    words_of,
)
from kobza.doctor.training.sources import MASKED, chat_of, open_source
from kobza.doctor.training.supervised import marked
from kobza.doctor.training.unicode import LOOK_ALIKES, count


@pytest.mark.parametrize("control", proof.CONTROLS, ids=lambda control: control.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_alarm_on_clean_data(control, seed):
    trial = selftest.run_trial("data", area.CHECKS, control, seed, "bf16" if seed == 1 else "fp32")
    assert trial.good, (trial.found, trial.broken)


@pytest.mark.parametrize("mutation", proof.MUTATIONS, ids=lambda mutation: f"{mutation.code} {mutation.name}")
def test_each_fault_is_caught_by_its_own_code(mutation):
    trial = selftest.run_trial("data", area.CHECKS, mutation, 0, "fp32")
    assert mutation.code in trial.found, trial.found
    assert not trial.broken


def test_every_code_has_its_mutation():
    assert selftest.unproven("data") == []


def findings(subject):
    return [finding for outcome in examine(area.CHECKS, subject) for finding in outcome.findings]


# ---- overlap ---------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("a b cd їж two three Four x1 ' . \n".split(" ")), max_size=60)


@given(WORDS, WORDS, st.integers(1, 4))
def test_runs_are_those_of_a_plain_search(train, val, n):
    """Which words of a text lie in a run of n that stands in the other, found by hashes and found by looking."""
    one, two = " ".join(train), " ".join(val)
    words, other = words_of(two), words_of(one)
    plain = [words.text(i, i) for i in range(len(words.hashes))]
    theirs = [other.text(i, i) for i in range(len(other.hashes))]
    known = {tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1)}
    expected = np.zeros(len(plain), bool)
    for i in range(len(plain) - n + 1):
        if tuple(plain[i : i + n]) in known:
            expected[i : i + n] = True
    blocks = (x[0] for x in streamed([one[: len(one) // 2], one[len(one) // 2 :]], False, (n,)))
    if len(plain) >= n and " " in one[len(one) // 2 - 1 : len(one) // 2 + 1]:  # the cut parts no word
        assert (covered(found_in(runs(words.hashes, n), blocks), n) == expected).all()
    found = found_in(runs(words.hashes, n), [runs(other.hashes, n)])
    if len(plain) >= n:
        assert (covered(found, n) == expected).all()


def test_a_run_is_found_across_blocks_and_in_another_dress():
    text = proof.prose(1, 20)
    words = words_of(text)
    dress = text.upper().replace("\n", "  ").replace(" ", " — ")
    middle = dress.index(" ", len(dress) // 2)
    blocks = [x[0] for x in streamed([dress[:middle], dress[middle:]], False, (13,))]
    assert found_in(runs(words.hashes, 13), blocks).all()
    assert not found_in(runs(words.hashes, 13), [runs(words_of(proof.prose(2, 20)).hashes, 13)]).any()


def test_where_words_are_no_measure_characters_are():
    text = "".join(chr(0x4E00 + i) for i in np.random.default_rng(0).integers(0, 3000, 400))
    assert counts_characters(text) and not counts_characters(proof.prose(0, 30))
    words = words_of(text, characters=True)
    assert len(words.hashes) == 400 and words.text(3, 5) == text[3:6]
    assert found_in(runs(words.hashes, 50), [runs(words_of(text[100:200], True).hashes, 50)]).sum() == 51


def test_the_longest_stretch():
    assert longest(np.array([0, 1, 1, 0, 1], bool)) == (1, 2) and longest(np.zeros(3, bool)) == (0, -1)
    hashes, sizes = line_hashes("abcd\nxy\n abcd\nabcd", 3)
    assert len(hashes) == 3 and hashes[0] == hashes[2] and sizes.tolist() == [4, 5, 4]


def test_the_passage_and_the_share_are_told(tmp_path):
    train, val = proof.prose(1, 500), proof.prose(2, 100)
    copied = "\n".join(val.split("\n")[40:60])
    (tmp_path / "t.txt").write_text(train + copied)
    (tmp_path / "v.txt").write_text(val)
    (finding,) = findings(area.open_(tmp_path / "t.txt", tmp_path / "v.txt"))
    share = len(words_of(copied).hashes) / len(words_of(val).hashes)
    assert finding.severity == "error" and f"{share:.1%}" in finding.got
    assert copied.split("\n")[0].lower()[:60] in finding.counterexample
    assert exit_code(examine(area.CHECKS, area.open_(tmp_path / "t.txt", tmp_path / "v.txt"))) == 1


# ---- characters ------------------------------------------------------------------------------------------------------


@given(
    st.text(alphabet="абвгґдеєжзиіїйклмнопрстуфхцчшщьюя", min_size=2, max_size=30).filter(lambda t: {"й", "ї"} & set(t))
)
def test_decomposed_letters_are_counted_one_by_one(text):
    assert count([unicodedata.normalize("NFD", text)]).counts["decomposed"] == sum(text.count(c) for c in "йї")
    assert not count([text]).counts


@pytest.mark.parametrize("text", ["Привіт, козаче", "Їжак і ґедзь", "été à l’œuvre", "„Straße“ naïve", "日本語です"])
def test_mojibake_is_undone(text):
    for wrong in ("cp1252", "cp1251", "latin-1"):
        try:
            broken = text.encode().decode(wrong)
        except UnicodeDecodeError:
            continue
        if wrong == "cp1251" and "Ñ" not in broken and not any("\u0400" <= c <= "\u04ff" for c in text):
            continue  # a single accented letter among Cyrillic ones: not told apart
        assert count([f"{broken} {broken}"]).counts["mojibake"], (wrong, broken)
    assert not count([text]).counts


@pytest.mark.parametrize(
    "text",
    [
        "«CAFÉ» « À LA CARTE » É\xa0» IRMÃ» MAÇÃ PÃO ÂMAGO 5\xa0° ±3 µm",
        "ÀÉÈÙÂÊÎÔÛËÏÜÇ ŒUVRE ÑANDÚ ÅÄÖ åäö ÆØÅ ÞÐ",
        "ПРИВІТ РСФСР СССР Рим Світ Рівне Сіль Тіло РЁВ",
        "Ма́ма мы́ла ра́му",
        "\u0301а",
        "iPhone та Wi-Fi, 3D-модель, USB-кабель, HTML",
        "👩‍👩‍👧 می‌خواهم क्‍ष",
        "don't won't can't 'quoted' “it’s”",
    ],
)
def test_clean_text_of_many_kinds_is_clean(text):
    assert not count([text]).counts


def test_look_alikes_in_either_direction():
    census = count(["кiт і сoбака, Cуко; приклад cат; звичайний text"])
    assert census.counts["look-alike"] == 4 and "Latin i" in census.examples["look-alike"][0]
    assert count(["а cаt"]).examples["look-alike"] == ["'cаt' has Cyrillic а"]
    assert len(LOOK_ALIKES) == 23


def test_invalid_utf8_is_told_with_its_offset(tmp_path):
    (tmp_path / "a.txt").write_bytes("добре\n".encode() + "погано\n".encode("cp1251") + "добре\n".encode())
    found = findings(area.open_(tmp_path / "a.txt"))
    assert [f.where for f in found if f.severity == "error"] == ["a.txt: byte 11"]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_is_shown_as_it_is_learnt():
    assert marked([1, 2, 3, 4], [MASKED, 2, 3, MASKED], lambda ids: "".join(map(str, ids))) == "1⟦23⟧4"


def test_the_rows_facts_show_the_decoded_text(tmp_path):
    subject = proof._labelled(lambda rows, ids: rows)(tmp_path, 0, "fp32")
    rows = dict(row for row in area.facts(subject)["Supervised tokens of train.jsonl"])
    assert rows["rows"] == "24" and "<|im_end|>" in rows["an answer's last token"]
    shown = next(text for name, text in rows.items() if name.endswith("learnt in ⟦ ⟧"))
    assert shown.startswith("<|im_start|>user\nWhat is ") and "<|im_start|>⟦" in shown and "<|im_end|>⟧" in shown


def test_shards_are_decoded_in_the_facts(tmp_path):
    subject = proof._shards("<u4", lambda ids, size: ids, vocab=70_000)(tmp_path, 0, "")
    assert subject.train.ids.dtype == "<u4" and "32-bit" in subject.train.notes[0]
    assert len(area.facts(subject)["Windows of train.bin"]) == 4


def test_a_run_folder_of_kobza_is_read(tmp_path):
    from kobza.config import DataConfig
    from kobza.data import Documents, prepare

    (tmp_path / "text.txt").write_text(proof.prose(3, 200))
    tokenizer = prepare(
        Documents([str(tmp_path / "text.txt")]), DataConfig(tokenizer="char"), tmp_path / "run" / "data"
    )
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    subject = area.open_(tmp_path / "run", tokenizer=tmp_path / "run")
    assert subject.train.kind == "ids" and findings(subject) == []
    assert repr(proof.prose(3, 200)[:3])[1:-1] in repr(subject.tokenizer.decode(subject.train.ids[:40].tolist()))


def test_messages_of_many_forms():
    assert chat_of({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}, "") == [
        ("user", "a"),
        ("assistant", ""),
    ]
    assert chat_of(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}, ""
    ) == [("user", "a")]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_folders_gz_and_many_files(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.txt").write_text("two\n")
    (tmp_path / "d" / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\n"))
    assert "".join(open_source(tmp_path / "d").blocks()) == "one\ntwo\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "no rows"),
        ("x.jsonl", b"[1]", "not an object"),
        ("x.jsonl", b'{"a": 1}', "no text, messages or input_ids"),
        ("x.jsonl", b"[" * 100_000, "not JSON"),
        ("x.jsonl", b'{"input_ids": [1]}', "without labels"),
        ("x.txt", b"", "empty"),
        ("x.bin", b"a", "no tokens"),
        ("x.py", b"a", "a .py file"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        area.open_(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": 3, "labels": 3},
        {"input_ids": [1], "labels": [1, 2]},
        {"input_ids": ["a"], "labels": [1]},
        {"input_ids": [10**30], "labels": [1]},
        {"input_ids": [1], "labels": [1], "attention_mask": [1, 1]},
        {"labels": [1]},
    ],
)
def test_a_bad_row_is_a_check_that_could_not_be_made(tmp_path, row):
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, row]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcomes = examine(area.CHECKS, area.open_(tmp_path / "x.jsonl"))
    assert exit_code(outcomes) == 2
    assert "\n" not in next(outcome.reason for outcome in outcomes if outcome.status == "failed")


@pytest.mark.parametrize(
    "index",
    [
        "[",
        "{}",
        '{"dtype": "object", "shards": [1]}',
        '{"dtype": "uint16", "shards": [4, 4]}',
        '{"dtype": "uint16", "shards": "ab"}',
        '{"dtype": "float32", "shards": [4]}',
        '{"dtype": "uint16", "shards": []}',
    ],
)
def test_a_hostile_index_is_one_line(tmp_path, index):
    (tmp_path / "index.json").write_text(index)
    (tmp_path / "00000.bin").write_bytes(b"12345678")
    with pytest.raises(InputError) as caught:
        area.open_(tmp_path)
    assert "\n" not in str(caught.value)


def test_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="a link out of its folder"):
        area.open_(tmp_path / "d")


def test_a_bomb_of_zeros_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("kobza.doctor.training.sources.MOST_BYTES", 8 << 20)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"a " * (20 << 20), 1))
    source = open_source(tmp_path / "x.txt.gz")
    assert sum(len(block) for block in source.blocks()) <= 12 << 20 and "only its first" in source.notes[0]


def test_an_endless_line_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("kobza.doctor.training.sources.BLOCK", 1 << 16)
    (tmp_path / "x.txt").write_bytes(b"abcdefghij" * 100_000)
    assert max(map(len, open_source(tmp_path / "x.txt").blocks())) <= 2 << 16
    assert findings(area.open_(tmp_path / "x.txt", tmp_path / "x.txt"))[0].code == "R19"


JUNK = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from("text messages prompt completion input_ids labels attention_mask role content".split()),
                inner,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.bin", "x.txt.gz", "index.json"])
@given(st.lists(JUNK, min_size=1, max_size=4))
def test_any_bytes_are_examined_or_refused_in_one_line(tmp_path_factory, name, parts):
    path = tmp_path_factory.mktemp("junk")
    (path / name).write_bytes(b"\n".join(parts))
    (path / "00000.bin").write_bytes(b"1234")
    try:
        subject = area.open_(
            path if name == "index.json" else path / name, path / name if name != "index.json" else None
        )
        outcomes = examine(area.CHECKS, subject)
        area.facts(subject)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        reasons = [outcome.reason for outcome in outcomes if outcome.status == "failed"]
        assert all("Error:" not in reason and "\n" not in reason for reason in reasons), reasons


def test_it_takes_no_torch(tmp_path):
    path = folder(tmp_path / "qwen", "qwen")
    (tmp_path / "t.txt").write_text(proof.prose(1, 100))
    code = (
        "import sys, pathlib\nfrom kobza.doctor.training import data as area\nfrom kobza.doctor.finding import examine\n"
        f"subject = area.open_(pathlib.Path({str(tmp_path / 't.txt')!r}), None, pathlib.Path({str(path)!r}))\n"
        "examine(area.CHECKS, subject), area.facts(subject)\n"
        "assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
