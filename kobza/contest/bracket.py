"""A knock-out bracket out of entries and votes: who meets whom, who won by what. A pure function, so every redrawing agrees.

Places are drawn by lot from a stated seed. Where the entries are no power of two, the first places pass the first round without
a match. A match is decided by the votes of distinct voters on its pair, whenever they were cast: by the first `enough` votes, or
by the first majority after that where these stand even. Later votes change nothing. At the contest's close what is open is
decided by the majority so far, else by strength in the standings, else by lot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

How = Literal["votes", "standings", "lot", "bye"]
Cast = Mapping[frozenset[int], Sequence[int | None]]  # pair -> the winner of each vote in order of time, None: a tie


@dataclass(frozen=True)
class Match:
    """Two places of a round: the entries' ids (None: not decided yet, or nobody), votes for each, winner and how."""

    left: int | None
    right: int | None
    left_votes: int = 0
    right_votes: int = 0
    ties: int = 0
    winner: int | None = None
    how: How | None = None

    @property
    def open(self) -> bool:
        """Whether it can be voted on now."""
        return self.left is not None and self.right is not None and self.winner is None


@dataclass(frozen=True)
class Bracket:
    """The rounds, from the first to the final, and who won it all."""

    rounds: tuple[tuple[Match, ...], ...]
    champion: int | None

    def open_pairs(self) -> set[frozenset[int]]:
        """The pairs that can be voted on now."""
        return {frozenset((m.left, m.right)) for round_ in self.rounds for m in round_ if m.open}  # type: ignore[arg-type]


def draw(
    entries: Sequence[int], lot: int, cast: Cast, enough: int, closed: bool, strength: Callable[[int], float]
) -> Bracket:
    """The bracket of the entries' ids. `closed`: nobody votes any more, so open matches are decided."""
    if not entries:
        return Bracket((), None)
    seeded = sorted(entries, key=lambda entry: by_lot(lot, entry))
    size = 1 << (len(seeded) - 1).bit_length()
    slots = [seeded[i] if i < len(seeded) else None for i in places(size)]
    rounds, byes = [], True
    while len(slots) > 1:
        pairs = zip(slots[::2], slots[1::2], strict=True)
        matches = [_play(a, b, byes, lot, cast, enough, closed, strength) for a, b in pairs]
        rounds.append(tuple(matches))
        slots, byes = [match.winner for match in matches], False
    return Bracket(tuple(rounds), slots[0])


def places(size: int) -> list[int]:
    """Seeds in the order of their slots, so that the first two can only meet in the final. places(4) -> [0, 3, 1, 2]"""
    order = [0]
    while len(order) < size:
        order = [place for seed in order for place in (seed, 2 * len(order) - 1 - seed)]
    return order


def by_lot(lot: int, *of: int) -> bytes:
    """What lots are compared by: the same on every machine."""
    return hashlib.sha256(repr((lot, of)).encode()).digest()


def _play(
    left: int | None,
    right: int | None,
    byes: bool,
    lot: int,
    cast: Cast,
    enough: int,
    closed: bool,
    strength: Callable[[int], float],
) -> Match:
    """One match. byes: an empty place is nobody's, rather than one whose match is still open."""
    if left is None or right is None:
        return Match(left, right, winner=left if left is not None else right, how="bye") if byes else Match(left, right)
    votes, counts = cast.get(frozenset((left, right)), ()), {left: 0, right: 0, None: 0}
    decided = None
    for n, winner in enumerate(votes, 1):
        counts[winner] += 1
        if n >= enough and counts[left] != counts[right]:
            decided = max((left, right), key=counts.__getitem__)
            break
    how: How = "votes"
    if decided is None and closed:
        even, equal = counts[left] == counts[right], strength(left) == strength(right)
        how = "votes" if not even else "lot" if equal else "standings"
        lots = {entry: by_lot(lot, left, right, entry) for entry in (left, right)}
        decided = max((left, right), key=lambda entry: (counts[entry], strength(entry), lots[entry]))
    tallies = counts[left], counts[right], counts[None]
    return Match(left, right, *tallies, winner=decided, how=None if decided is None else how)
