"""What a person should see of the rows before the first step: what is learned and what is masked, how long rows are, what was
cut, what stands there twice, whether the answers' ends are learned; and what forbids to start.

`examine` counts, `xray_page.py` draws. The laws are those of the doctor's codes of the same numbers (`kobza doctor explain R3`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kobza.finetune.example import Row

SHOWN = 6  # rows drawn
CUT_SHARE = 0.05  # of the rows, before it is worth a warning
TWICE_SHARE = 0.02
SEEN_SHARE = 0.01
TAIL = 3  # learned tokens at most from an answer's end token on: a template may put a line end or two behind it


@dataclass(frozen=True)
class Remark:
    """Something a person should know: "error" forbids to start, "warn" and "info" do not."""

    severity: str
    code: str
    text: str


@dataclass(frozen=True)
class Side:
    """The rows of one side of the split, counted."""

    rows: int
    tokens: int
    learned: int
    lengths: tuple[int, int, int, int]
    """shortest, median, 95% are no longer, longest"""
    cut: int
    """rows that lost tokens"""
    nothing: int
    """rows of which nothing is learned"""
    twice: int
    """rows that repeat an earlier one"""


@dataclass(frozen=True)
class Xray:
    """What was seen. `shown` are rows to draw, from all over the range of lengths."""

    train: Side
    val: Side
    answers: int
    """answers that are whole, over both sides: what was cut has no end to learn"""
    ended: int
    """of them those whose end token is learned"""
    conflicts: int
    """questions that stand there with different answers"""
    seen: int
    """held-out rows that stand in the training rows word for word"""
    shown: tuple[Row, ...]
    remarks: tuple[Remark, ...]

    @property
    def refuses(self) -> list[Remark]:
        """What forbids to start."""
        return [remark for remark in self.remarks if remark.severity == "error"]


def examine(train: Sequence[Row], val: Sequence[Row], ends: Sequence[int], remarks: Sequence[Remark] = ()) -> Xray:
    """The X-ray of rows as they came out of a file. ends: ids that end an answer; remarks: of others, to be shown with ours."""
    sides, both = (side(train), side(val)), [*train, *val]
    told = [ends_learned(row, ends) for row in both]
    answers, ended = (sum(column) for column in zip(*told, strict=True)) if told else (0, 0)
    endless = [row for row, (some, good) in zip(both, told, strict=True) if good < some]
    keys = {row.ids.tobytes() for row in train}
    seen = sum(row.ids.tobytes() in keys for row in val)
    counts = (answers, ended, conflicting(train), seen)
    found = [*remarks, *judge(*sides, *counts, both, endless)]
    order = ("error", "warn", "info")
    found.sort(key=lambda remark: order.index(remark.severity))
    return Xray(*sides, *counts, chosen(train, endless), tuple(found))


def side(rows: Sequence[Row]) -> Side:
    """Counts of one side."""
    lengths = np.array([len(row.ids) for row in rows] or [0])
    spread = (int(lengths.min()), int(np.median(lengths)), int(np.quantile(lengths, 0.95)), int(lengths.max()))
    learned = [int(row.learned.sum()) for row in rows]
    twice = len(rows) - len({row.ids.tobytes() for row in rows})
    cut = sum(row.cut > 0 for row in rows)
    return Side(len(rows), int(lengths.sum()), sum(learned), spread, cut, learned.count(0), twice)


def stretches(learned: np.ndarray) -> list[tuple[int, int]]:
    """Where learned tokens stand side by side, as (start, stop). [F, T, T, F, T] -> [(1, 3), (4, 5)]"""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], learned.astype(np.int8), [0]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def ends_learned(row: Row, ends: Sequence[int]) -> tuple[int, int]:
    """(whole answers, those whose end token is learned). What is learned belongs to the next end token, so that an answer whose
    reasoning is masked counts once; one that was cut with its row has no end."""
    places, closed, open_ = np.flatnonzero(np.isin(row.ids, ends)), set(), 0
    for start, stop in stretches(row.learned):
        at = int(np.searchsorted(places, max(start, stop - TAIL)))
        if at < len(places):
            closed.add(int(places[at]))
        else:
            open_ += not row.cut
    return len(closed) + open_, sum(bool(row.learned[i]) for i in closed)


def conflicting(rows: Sequence[Row]) -> int:
    """Questions, all that stands before the first answer, which have several answers among the rows. Where all but the first
    token is learned nothing tells a question from its answer."""
    answers: dict[bytes, set[bytes]] = {}
    for row in rows:
        first = int(row.learned.argmax())
        if first > 1:
            answers.setdefault(row.ids[:first].tobytes(), set()).add(row.ids[first:].tobytes())
    return sum(len(several) > 1 for several in answers.values())


def chosen(train: Sequence[Row], endless: Sequence[Row]) -> tuple[Row, ...]:
    """Rows to look at: some that are not as they should be, then others, evenly over the range of lengths."""
    odd = [*endless[:2], *[row for row in train if row.cut or not row.learned.any()][:2]]
    known = {id(row) for row in odd}
    usual = sorted((row for row in train if not row.cut and id(row) not in known), key=lambda row: len(row.ids))
    n = min(SHOWN - len(odd), len(usual))
    return tuple(odd + [usual[i] for i in np.linspace(0, len(usual) - 1, n).astype(int)])


def judge(
    train: Side,
    val: Side,
    answers: int,
    ended: int,
    conflicts: int,
    seen: int,
    rows: Sequence[Row],
    endless: Sequence[Row],
) -> list[Remark]:
    """What a person should know of the counts."""
    found, whole = [], train.rows + val.rows
    if not train.learned or not val.learned:
        where = "training" if not train.learned else "held-out"
        why = "raise --max-len" if train.cut + val.cut else "look at --answer, --learn and the template"
        found.append(Remark("error", "R5", f"not one token of the {where} rows is learned; {why}"))
    elif train.nothing + val.nothing:
        n = train.nothing + val.nothing
        first = next(row.where for row in rows if not row.learned.any())
        found.append(Remark("warn", "R5", f"{n} of {whole} rows have nothing to learn and are left out, first {first}"))
    if endless:
        first = f"first {endless[0].where}"
        text = f"{answers - ended} of {answers} answers are learned without their end, {first}, so the model would never stop"
        remedy = "the template must close an answer with a token that ends it"
        found.append(Remark("error", "R3", f"{text}; {remedy}"))
    if train.cut + val.cut:
        share = (train.cut + val.cut) / whole
        most = max(row.cut for row in rows)
        text = f"{share:.1%} of the rows are longer than --max-len and were cut, their ends too; the longest lost {most} tokens"
        found.append(Remark("warn" if share > CUT_SHARE else "info", "R3", text))
    if train.twice:
        share = train.twice / train.rows
        found.append(
            Remark("warn" if share > TWICE_SHARE else "info", "R19", f"{train.twice} training rows repeat another")
        )
    if seen:
        text = (
            f"{seen} of {val.rows} held-out rows stand word for word in the training rows: the validation loss flatters"
        )
        remedy = "drop repeats, or name the column that makes rows alike: --group"
        found.append(Remark("warn" if seen > SEEN_SHARE * val.rows else "info", "R19", f"{text}; {remedy}"))
    if conflicts:
        found.append(
            Remark("info", "R19", f"{conflicts} questions have several answers; no model can get all of them right")
        )
    return found


def histogram(rows: Sequence[Row], bins: int = 32) -> list[tuple[int, int]]:
    """(shortest length of the bin, rows) from the shortest row to the longest."""
    lengths = np.array([len(row.ids) for row in rows] or [0])
    first = int(lengths.min())
    width = -(-(int(lengths.max()) - first + 1) // bins)
    counts = np.bincount((lengths - first) // width).tolist()
    return [(first + i * width, n) for i, n in enumerate(counts)]
