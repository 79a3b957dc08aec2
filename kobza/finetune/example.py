"""What passes through this room: an Example is a conversation out of a person's file, a Row its ids and what of
them is learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

Message = dict[str, Any]  # {"role": "user", "content": "Hi"}, as chat templates take it


@dataclass(frozen=True)
class Example:
    """A conversation. Its last message is the answer to learn; for rewards it may end with the question."""

    messages: tuple[Message, ...]
    where: str
    """for a person: "titanic.csv row 12" """
    group: str = ""
    """examples of one group stay on one side of the split; "": its own"""
    stratum: str = ""
    """strata keep their shares on both sides of the split"""
    rejected: str | None = None
    """preference: a worse answer to the same question"""
    desirable: bool | None = None
    """whether the answer is a good one, where examples come unpaired (KTO)"""
    expected: str | None = None
    """what a reward compares the model's own answer with"""
    extra: dict[str, Any] = field(default_factory=dict)
    """further variables of the template, "tools" among them"""


@dataclass(frozen=True)
class Row:
    """Ids of a conversation, (T,) int32, and which of them are targets, (T,) bool; the first never is."""

    ids: np.ndarray
    learned: np.ndarray
    where: str
    cut: int = 0
    """tokens that did not fit"""


class Packed(NamedTuple):
    """A Batch (train.py reads the first alone): several documents may stand in one row of it. All (B, T)."""

    inputs: Any
    """int64 ids"""
    targets: Any
    """int64: the token that follows each, IGNORE where it is not learned"""
    positions: Any
    """int64: the place of each token in its document"""
    documents: Any
    """int64: which document of its row each token belongs to, -1: padding"""
