"""What a contest consists of, and what its voters and entrants may be refused, a class each so that pages can tell them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kobza.config import InputError
from kobza.contest.strength import Strength
from kobza.contest.submission import Submission, Verdict

State = Literal["collecting", "voting", "closed"]
Choice = Literal["left", "right", "tie"]
Status = Literal["pending", "accepted", "refused"]


class Refused(InputError):
    """What a voter or an entrant may not do now."""


class WrongState(Refused):
    """Not in this state of the contest."""


class WrongCode(Refused):
    """No such join code, or one that has run out."""


class NameTaken(Refused):
    """Another voter goes by this name."""


class NotYours(Refused):
    """No such pair was shown to this voter: forged, or of another contest."""


class AlreadyVoted(Refused):
    """This voter has voted on this pair: a replay."""


class TooFast(Refused):
    """More votes a minute than the rules allow; `seconds` until the next one is taken."""

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


class Duplicate(Refused):
    """Its text or its weights are entered already."""


class TooMany(Refused):
    """More entries or voters than are allowed."""


@dataclass(frozen=True)
class Entry:
    """A submission in the contest. title: the person's name, with a number from their second entry on."""

    id: int
    title: str
    submission: Submission
    status: Status
    verdict: Verdict | None
    voter: str | None  # who sent it through the pages
    added: float


@dataclass(frozen=True)
class Voter:
    """Somebody who votes. The id is a secret between them and us."""

    id: str
    name: str


@dataclass(frozen=True)
class Pair:
    """Two entries as one voter sees them."""

    id: str
    left: Entry
    right: Entry


@dataclass(frozen=True)
class Vote:
    """One vote: the entries' ids as they stood, and what was chosen."""

    voter: str  # their name
    left: int
    right: int
    choice: Choice
    at: float

    @property
    def winner(self) -> int | None:
        """The entry that was preferred; None: a tie."""
        return {"left": self.left, "right": self.right, "tie": None}[self.choice]


@dataclass(frozen=True)
class Standing:
    """An entry's place; equal strengths share one."""

    place: int
    entry: Entry
    strength: Strength
    wins: int
    losses: int
    ties: int

    @property
    def chance(self) -> float:
        """Of winning against an entry of mean strength."""
        return 1 / (1 + math.exp(-self.strength.value))


@dataclass(frozen=True)
class LogLine:
    """Who did what when."""

    at: float
    who: str
    what: str
