"""Which stretches of a text stand word for word in another: a suffix array, searched for all places of a text at once.

`TextIndex(haystack).longest(needle)` gives, for each place of the needle, how many characters from there on stand somewhere in
the haystack. All that novelty and memorisation ask follows from it: an n-gram is new where fewer than n match.
Suffix arrays: Manber & Myers 1990; sorted by doubling, each round only what is not in order yet (Larsson & Sadakane 2007).
"""

from __future__ import annotations

import numpy as np

CHUNK = 32  # characters compared at once


class TextIndex:
    """The suffixes of a text in order."""

    def __init__(self, text: str):
        self.points = code_points(text)
        self.order = suffix_array(self.points)

    def longest(self, text: str) -> np.ndarray:
        """For each place of `text` (n,): the length of the longest match, from there on, with any stretch of the indexed text."""
        needle = code_points(text)
        places, n = np.arange(len(needle)), len(self.points)
        if n == 0:
            return np.zeros(len(needle), np.int64)
        low, best = np.zeros(len(needle), np.int64), np.zeros(len(needle), np.int64)
        high = np.full(len(needle), n)  # the needle's place among the suffixes in order lies in [low, high]
        while (low < high).any():
            middle = (low + high) // 2
            suffix = self.order[np.minimum(middle, n - 1)]
            common = self._common(needle, places, suffix)
            best = np.where(low < high, np.maximum(best, common), best)
            after = self._less(needle, places + common, suffix + common)
            low, high = np.where((low < high) & after, middle + 1, low), np.where((low < high) & ~after, middle, high)
        return best

    def _common(self, needle: np.ndarray, places: np.ndarray, suffixes: np.ndarray) -> np.ndarray:
        """Length of the common beginning of needle[place:] and points[suffix:], for each pair."""
        common = np.zeros(len(places), np.int64)
        active = np.arange(len(places))
        reach = np.arange(CHUNK)
        while len(active):
            a, b = places[active] + common[active], suffixes[active] + common[active]
            room = np.minimum(np.minimum(len(needle) - a, len(self.points) - b), CHUNK)
            ours = needle[np.minimum(a[:, None] + reach, len(needle) - 1)]
            theirs = self.points[np.minimum(b[:, None] + reach, len(self.points) - 1)]
            equal = (ours == theirs) & (reach < room[:, None])
            run = np.where(equal.all(1), CHUNK, equal.argmin(1))
            common[active] += run
            active = active[run == CHUNK]
        return common

    def _less(self, needle: np.ndarray, places: np.ndarray, suffixes: np.ndarray) -> np.ndarray:
        """Whether the suffix's next character comes before the needle's; the end of a text comes before all."""
        ours = np.where(places < len(needle), needle[np.minimum(places, len(needle) - 1)], -1)
        theirs = np.where(suffixes < len(self.points), self.points[np.minimum(suffixes, len(self.points) - 1)], -1)
        return theirs < ours


def code_points(text: str) -> np.ndarray:
    """The characters of a text as int64 (n,)."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32).astype(np.int64)


def suffix_array(points: np.ndarray) -> np.ndarray:
    """Where the suffixes start, in their order. suffix_array of "banana" -> [5, 3, 1, 0, 4, 2]"""
    n = len(points)
    _, symbols = np.unique(points, return_inverse=True)
    rank, length = _packed(symbols.astype(np.int64) + 1)
    order = np.argsort(rank, kind="stable")
    rank, tied = _ranks(order, rank[order])
    while tied.any():
        open_ = np.flatnonzero(tied)  # places in the order that share their rank with a neighbour
        suffixes = order[open_]
        follow = np.where(suffixes + length < n, rank[np.minimum(suffixes + length, n - 1)] + 1, 0)
        head = rank[suffixes]
        inner = np.lexsort((follow, head))
        order[open_] = suffixes[inner]
        head, follow = head[inner], follow[inner]
        new = np.ones(len(open_), bool)
        new[1:] = (head[1:] != head[:-1]) | (follow[1:] != follow[:-1])
        first = np.maximum.accumulate(np.where(new, open_, 0))  # a group's rank: the place of its first
        rank[order[open_]] = first
        last = np.append(new[1:], True)
        tied[open_] = ~(new & last)
        length *= 2
    return order


def _packed(symbols: np.ndarray) -> tuple[np.ndarray, int]:
    """As many characters of each suffix as a 64-bit integer holds, and how many these are. symbols from 1; 0 is the end."""
    bits = max(1, int(symbols.max(initial=1)).bit_length())
    length = 62 // bits
    packed = np.zeros(len(symbols), np.int64)
    for i in range(length):
        packed <<= bits
        packed[: max(0, len(symbols) - i)] |= symbols[i:]
    return packed, length


def _ranks(order: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys in order -> the rank of each suffix (the place of the first with its key), and which places share theirs."""
    new = np.ones(len(keys), bool)
    new[1:] = keys[1:] != keys[:-1]
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))
    return rank, ~(new & np.append(new[1:], True)[: len(keys)])


def covered(longest: np.ndarray, at_least: int) -> np.ndarray:
    """Which characters (n,) stand in a match of at least so many. covered([0, 3, 2, 1, 0], 3) -> [F, T, T, T, F]"""
    starts = np.flatnonzero(longest >= at_least)
    change = np.zeros(len(longest) + 1, np.int64)
    np.add.at(change, starts, 1)
    np.add.at(change, starts + longest[starts], -1)
    return np.cumsum(change[:-1]) > 0
