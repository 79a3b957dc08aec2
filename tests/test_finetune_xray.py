"""Each law of the X-ray is found where it is planted and nowhere else; a page and a terminal show hostile text as text."""

import random
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kobza.finetune import xray_page
from kobza.finetune.example import Row
from kobza.finetune.xray import Remark, conflicting, ends_learned, examine, histogram, stretches
from kobza.finetune.xray_page import bits, figures, numbers, page, remark_text, row_text
from kobza.tokenizer import ByteTokenizer, LibraryTokenizer

ASK, END, TURN = 500, 501, 502  # "<|user|>", the end of an answer, "<|assistant|>"
ENDS = [END]


def a_row(question, answer, where="rows.csv row 1", **changes):
    """<|user|> question <|assistant|> answer <end>, of which the answer and its end are learned."""
    ids = [ASK, *question, TURN, *answer, END]
    learned = [False] * (len(question) + 2) + [True] * (len(answer) + 1)
    return replace(Row(np.array(ids, np.int32), np.array(learned), where), **changes)


def some(n, seed=0):
    generator = random.Random(seed)
    return [
        a_row(
            [seed, i, *generator.choices(range(300), k=generator.randint(3, 20))],
            [i % 2 + 400],
            f"rows.csv row {i + 2}",
        )
        for i in range(n)
    ]


def codes(xray):
    return [(remark.severity, remark.code) for remark in xray.remarks]


def unlearned(row, *places):
    learned = row.learned.copy()
    learned[list(places)] = False
    return replace(row, learned=learned)


# ---- the laws ------------------------------------------------------------------------------------------------------


def test_clean_rows_raise_nothing():
    seen = examine(some(40), some(10, 1), ENDS)
    assert codes(seen) == [] and seen.refuses == []
    assert (seen.answers, seen.ended, seen.conflicts, seen.seen) == (50, 50, 0, 0)
    assert seen.train.tokens == sum(len(row.ids) for row in some(40)) and seen.train.learned == 80
    assert len(seen.shown) == 6 and len(seen.shown[0].ids) < len(seen.shown[-1].ids)


def test_one_masked_end_among_many_forbids_to_start():
    rows = some(40)
    rows[17] = unlearned(rows[17], -1)
    seen = examine(rows, some(10, 1), ENDS)
    assert codes(seen) == [("error", "R3")] and (seen.answers, seen.ended) == (50, 49)
    assert "1 of 50 answers" in seen.refuses[0].text and "first rows.csv row 19" in seen.refuses[0].text
    assert seen.shown[0] is rows[17] and len({id(row) for row in seen.shown}) == 6


def test_an_answer_without_an_end_at_all_forbids_to_start():
    rows = [replace(row, ids=row.ids[:-1], learned=row.learned[:-1]) for row in some(4)]
    assert codes(examine(rows, some(3, 1), ENDS)) == [("error", "R3")]
    assert codes(examine(some(4), some(3, 1), [END + 1])) == [("error", "R3")]


def conversation(masked=()):
    """Two questions and two answers in one row, each closed by END."""
    ids = [ASK, 1, 2, END, TURN, 10, 11, 12, 13, END, ASK, 3, 4, END, TURN, 20, 21, 22, END]
    learned = [5 <= i < 10 or i >= 15 for i in range(len(ids))]
    return unlearned(Row(np.array(ids, np.int32), np.array(learned), "two turns"), *masked)


@pytest.mark.parametrize(
    "row, counts",
    [
        (conversation(), (2, 2)),
        (conversation([9]), (2, 1)),
        (conversation([18]), (2, 1)),
        (conversation([9, 18]), (2, 0)),
        (conversation([16, 17]), (2, 2)),  # a reasoning left out amid an answer
        (conversation([5]), (2, 2)),  # or at its beginning
        (replace(conversation(), learned=np.arange(19) > 0), (1, 1)),  # --learn all
        (replace(conversation(), learned=(np.arange(19) > 0) & (np.arange(19) < 18)), (1, 0)),
        (
            replace(
                conversation(), ids=np.append(conversation().ids, 7), learned=np.append(conversation().learned, True)
            ),
            (2, 2),
        ),
    ],
)
def test_what_is_learned_belongs_to_the_next_end(row, counts):
    assert ends_learned(row, ENDS) == counts


def test_cut_answers_are_counted_and_have_no_end_to_learn():
    rows = some(40)
    for i in (3, 5, 8):
        rows[i] = replace(rows[i], ids=rows[i].ids[:-1], learned=rows[i].learned[:-1], cut=4 + i)
    seen = examine(rows, some(10, 1), ENDS)
    assert codes(seen) == [("warn", "R3")] and seen.train.cut == 3
    assert "6.0% of the rows" in seen.remarks[0].text and "lost 12 tokens" in seen.remarks[0].text
    assert seen.shown[0].cut and seen.shown[1].cut
    assert codes(examine(rows[:4] + some(90, 2), some(10, 1), ENDS)) == [("info", "R3")]  # one in a hundred


def test_nothing_learned_forbids_to_start_on_either_side():
    nothing = [unlearned(row, *range(len(row.ids))) for row in some(5, 2)]
    for train, val, where in ((nothing, some(5), "training"), (some(5), nothing, "held-out")):
        seen = examine(train, val, ENDS)
        assert codes(seen) == [("error", "R5")] and f"not one token of the {where} rows" in seen.refuses[0].text
    cut = [replace(row, cut=9) for row in nothing]
    assert "raise --max-len" in examine(cut, some(5), ENDS).refuses[0].text


def test_some_rows_without_anything_to_learn_are_told_with_the_first_of_them():
    rows = some(20)
    rows[7] = unlearned(rows[7], *range(len(rows[7].ids)))
    seen = examine(rows, some(4, 1), ENDS)
    assert codes(seen) == [("warn", "R5")] and "first rows.csv row 9" in seen.remarks[0].text
    assert seen.shown[0] is rows[7]


def test_repeats_conflicts_and_leaks_are_told_apart():
    rows, held = some(40), some(10, 1)
    assert codes(examine([*rows, rows[0]], held, ENDS)) == [("warn", "R19")]  # 1 of 41 is above 2%
    assert codes(examine([*rows, *some(40, 2), rows[0]], held, ENDS)) == [("info", "R19")]
    other = rows[4].ids.copy()
    other[-2] = 444
    seen = examine([*rows, replace(rows[4], ids=other)], held, ENDS)
    assert codes(seen) == [("info", "R19")] and (seen.conflicts, seen.train.twice, seen.seen) == (1, 0, 0)
    seen = examine(rows, [*held, rows[4]], ENDS)
    assert codes(seen) == [("warn", "R19")] and seen.seen == 1 and "--group" in seen.remarks[0].text


def test_learning_every_token_is_no_conflict_of_answers():
    rows = [replace(row, learned=np.arange(len(row.ids)) > 0) for row in some(20)]
    assert conflicting(rows) == 0 and codes(examine(rows, some(4, 1), ENDS)) == []


def test_remarks_of_others_are_shown_with_ours_the_worst_first():
    theirs = [Remark("info", "L1", "a"), Remark("error", "T9", "b")]
    rows = some(10)
    seen = examine([*rows, rows[0]], some(4, 1), ENDS, theirs)
    assert codes(seen) == [("error", "T9"), ("warn", "R19"), ("info", "L1")] and seen.refuses == [theirs[1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_stretches_cover_what_is_learned_and_nothing_else(learned):
    found = stretches(np.array(learned, dtype=bool))
    assert [i for a, b in found for i in range(a, b)] == [i for i, yes in enumerate(learned) if yes]
    assert all(b < a for (_, b), (a, _) in zip(found, found[1:], strict=False))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 3000), min_size=1, max_size=50))
def test_the_bars_hold_every_row_once(lengths):
    rows = [Row(np.zeros(n, np.int32), np.zeros(n, bool), "") for n in lengths]
    bars = histogram(rows)
    assert sum(n for _, n in bars) == len(rows) and len(bars) <= 32 and bars[0][0] == min(lengths)
    width = bars[1][0] - bars[0][0] if len(bars) > 1 else 10**6
    assert all(n == sum(start <= length < start + width for length in lengths) for start, n in bars)


def test_ten_thousand_rows_take_less_than_a_second():
    rows, held = some(9000), some(1000, 1)
    examine(rows[:100], held[:100], ENDS)
    began = time.process_time()
    seen = examine(rows, held, ENDS)
    page("t", seen, rows, lambda i: f"{i} ", ENDS)
    assert time.process_time() - began < 1.0


# ---- what a person sees --------------------------------------------------------------------------------------------

NAMES = ["<|user|>", "<|assistant|>", "<|end|>"]


def of_text(tokenizer, question, answer, where="titanic.csv row 7"):
    user, assistant, end = (tokenizer.specials[name] for name in NAMES)
    ask = [user, *tokenizer.encode(question).tolist(), assistant]
    say = [*tokenizer.encode(answer).tolist(), end]
    return Row(np.array(ask + say, np.int32), np.arange(len(ask) + len(say)) >= len(ask), where)


def piece_of(tokenizer):
    names = {i: name for name, i in tokenizer.specials.items()}
    return lambda i: names.get(i, tokenizer.pieces[i])


def drawn_page(rows, tokenizer, title="t", remarks=()):
    ends = [tokenizer.specials["<|end|>"]]
    return page(title, examine(rows, rows[:1], ends, remarks), rows, piece_of(tokenizer), ends)


HOSTILE = (
    "<script>alert(1)</script>{{ 7919 * 7907 }}{% raw %}<img src=x onerror=y>&lt;\x00\x07\x9b31m\x1b[2J\x1b]0;owned\x07"
    "\r\u202egnp.exe\u2066\u200b\ufeff\U000e0041 [bold]red[/bold] ]]>"
)
FORBIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_hostile_cells_stay_text_in_page_and_terminal(kind):
    bpe = kind == "bpe"
    tokenizer = LibraryTokenizer.train([HOSTILE * 3], 400, NAMES) if bpe else ByteTokenizer(NAMES)
    row = of_text(tokenizer, HOSTILE, HOSTILE, f"a\n{HOSTILE}.csv row 1")
    html = drawn_page([row], tokenizer, HOSTILE, [Remark("info", "R5", HOSTILE)])
    assert not FORBIDDEN.search(html) and "<script" not in html and "<img" not in html and "62615533" not in html
    assert "⟨U+202E⟩" in html and "⟨U+E0041⟩" in html and "␍" in html and "{{ 7919 * 7907 }}" in html
    assert "default-src 'none'" in html

    console = Console(width=10_000, force_terminal=True, color_system="truecolor", record=True)
    with console.capture() as capture:
        console.print(row_text(row, piece_of(tokenizer), [tokenizer.specials["<|end|>"]]))
        console.print(remark_text(Remark("warn", "R5", HOSTILE)))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())  # rich's own colours
    assert not FORBIDDEN.search(plain) and "[bold]red[/bold]" in plain and "⟨U+202E⟩" in plain


def test_every_token_stands_by_itself_with_its_id_and_the_text_is_whole():
    tokenizer = LibraryTokenizer.train(["Did they survive? yes no Пливе кача 👩‍👩‍👧 "] * 3, 330, NAMES)
    question, answer = "Did they survive?\n Пливе 👩‍👩‍👧", "yes, 日本"
    row = of_text(tokenizer, question, answer)
    ends = [tokenizer.specials["<|end|>"]]
    found = bits(row, piece_of(tokenizer), ends)
    assert "".join(bit.text for bit in found) == f"<|user|>{question}<|assistant|>{answer}<|end|>"
    assert [i for bit in found for i in bit.ids] == row.ids.tolist()
    assert [bit.kind for bit in found if bit.ids[0] >= 0][-1] == "learned end"
    learned = [i for bit in found for i in bit.ids if bit.kind.startswith("learned")]
    assert learned == row.ids[row.learned].tolist()
    many = [bit for bit in found if len(bit.ids) > 1]
    assert many and all(len(bit.text) == 1 for bit in many)  # bytes of one character, no more
    half = of_text(ByteTokenizer(NAMES), "", "é")
    half = Row(np.delete(half.ids, -2), np.delete(half.learned, -2), "x")  # its second byte gone, the end behind it
    last = bits(half, piece_of(ByteTokenizer(NAMES)), ends)[-2:]
    assert [(bit.text, len(bit.ids)) for bit in last] == [("\ufffd", 1), ("<|end|>", 1)]
    html = drawn_page([row], tokenizer)
    assert html.count('title="learned') == sum(bit.kind.startswith("learned") for bit in found) and "↵\n" in html


def test_the_learned_part_of_a_long_row_is_shown():
    tokenizer = ByteTokenizer(NAMES)
    row = of_text(tokenizer, "a" * 5000, "yes")
    found = bits(row, piece_of(tokenizer), [tokenizer.specials["<|end|>"]])
    assert len(found) < 200 and "".join(bit.text for bit in found).endswith("aa<|assistant|>yes<|end|>")
    assert [bit.text for bit in found if bit.kind == "gap"] == ["… 4,842 more masked …"]
    turns = [of_text(tokenizer, "q", "a")] * 600
    whole = Row(np.concatenate([r.ids for r in turns]), np.concatenate([r.learned for r in turns]), "x")
    found = bits(whole, piece_of(tokenizer), [])
    assert len(found) == xray_page.MOST_TOKENS + 1 and found[-1].text == f"… {5 * 600 - 1200:,} more tokens"


def test_the_verdict_the_numbers_and_the_remarks_are_on_the_page():
    tokenizer = ByteTokenizer(NAMES)
    rows = [of_text(tokenizer, f"question {i}", "yes") for i in range(30)]
    good, bad = drawn_page(rows, tokenizer), drawn_page([unlearned(rows[0], -1), *rows[1:]], tokenizer)
    assert "Nothing here forbids" in good and "cannot teach" not in good
    assert "These rows cannot teach" in bad and "ERROR R3" in bad and 'class="card remark error"' in bad
    seen = examine(rows, rows[:2], [tokenizer.specials["<|end|>"]])
    told = dict(numbers(seen))
    assert told["rows"] == "30 to learn, 2 held out" and told["ends learned"] == "all of 32 answers"
    assert figures(seen)["train"]["rows"] == 30 and "shown" not in figures(seen)
