"""What a fine-tuned model really learns to write: rows of input_ids and labels, audited.

A label is the id itself or MASKED, as Hugging Face's losses take it. The laws: something is supervised in every row, the
end-of-text after an answer too, padding never, and labels stand at their tokens' own places, since those losses shift by
themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kobza.config import InputError, require
from kobza.doctor.training.sources import MASKED

MOST_ROWS = 20_000


@dataclass
class Audit:
    """What was counted over the rows; `where` of the first row that breaks a law, and what it showed."""

    n_rows: int = 0
    n_tokens: int = 0
    n_supervised: int = 0
    shares: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    empty: int = 0
    none: int = 0
    whole: int = 0
    padded: int = 0
    kept: int = 0
    shifted: int = 0
    after: Counter[int] = field(default_factory=Counter)
    """the masked id right behind the last supervised one"""
    last: Counter[int] = field(default_factory=Counter)
    """the last supervised id"""
    first: dict[str, tuple[str, list[int], list[int], int]] = field(default_factory=dict)
    """law -> (where, ids, labels, place) of the first row that breaks it"""

    def note(self, law: str, where: str, ids: list[int], labels: list[int], place: int) -> None:
        """Keep the first example of a law."""
        self.first.setdefault(law, (where, ids, labels, place))


def audit(rows: Iterable[tuple[str, dict[str, Any]]]) -> Audit:
    """The Audit of at most MOST_ROWS rows."""
    made = Audit()
    for where, row in rows:
        if made.n_rows >= MOST_ROWS:
            break
        ids, labels = (_numbers(row.get(key), f"{where}: {key}") for key in ("input_ids", "labels"))
        require(
            len(ids) == len(labels), f"{where}: {len(ids)} input_ids and {len(labels)} labels; they must be as many"
        )
        mask = _numbers(row["attention_mask"], f"{where}: attention_mask") if "attention_mask" in row else None
        require(mask is None or len(mask) == len(ids), f"{where}: attention_mask is not as long as input_ids")
        _count(made, where, ids, labels, mask)
    return made


def _numbers(given: Any, where: str) -> np.ndarray:
    require(isinstance(given, list), f"{where} is a {type(given).__name__}; it must be a list of ids")
    if any(type(i) is not int or not -(1 << 31) <= i < 1 << 32 for i in given):
        raise InputError(f"{where} holds something that is no id")
    return np.array(given, np.int64)


def _count(made: Audit, where: str, ids: np.ndarray, labels: np.ndarray, mask: np.ndarray | None) -> None:
    on = labels != MASKED
    n, n_on = len(ids), int(on.sum())
    row = (where, ids.tolist(), labels.tolist())
    made.n_rows, made.n_tokens, made.n_supervised = made.n_rows + 1, made.n_tokens + n, made.n_supervised + n_on
    made.lengths.append(n)
    real = n if mask is None else int(mask.sum())
    made.shares.append(n_on / real if real else 0.0)
    if n == 0:
        made.empty += 1
    elif n_on == 0:
        made.none += 1
        made.note("none", *row, 0)
    if n_on == 0:
        return
    made.whole += n_on == n
    if mask is not None and bool((on & (mask == 0)).any()):
        made.padded += 1
        made.note("padded", *row, int(np.flatnonzero(on & (mask == 0))[0]))
        return
    made.kept += bool((labels == ids)[on].all())
    made.shifted += bool((labels[:-1] == ids[1:])[on[:-1]].all()) and n_on > 1
    place = int(np.flatnonzero(on)[-1])
    made.last[int(ids[place])] += 1
    if place + 1 < n:
        made.after[int(ids[place + 1])] += 1
        made.note(f"after {int(ids[place + 1])}", *row, place + 1)
    made.note(f"last {int(ids[place])}", *row, place)


def marked(ids: Sequence[int], labels: Sequence[int], show: Callable[[Sequence[int]], str], most: int = 300) -> str:
    """A row's text with what is supervised in ⟦ ⟧: 'user: hi ⟦hello</s>⟧'."""
    parts, start = [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (labels[i] == MASKED) != (labels[start] == MASKED):
            text = show(ids[start:i])
            parts.append(text if labels[start] == MASKED else f"⟦{text}⟧")
            start = i
    whole = "".join(parts)
    return whole if len(whole) <= most else whole[: most // 2] + " … " + whole[-most // 2 :]
