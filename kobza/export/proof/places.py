"""At how many places of which texts an engine is asked for its probabilities, so that the cost stays bounded."""

from __future__ import annotations

from collections.abc import Sequence

NUMBERS = 4_000_000  # log-probabilities asked of an engine by default; llama.cpp lists 150,000 a second


def affordable(vocab_size: int) -> int:
    """Positions for which an engine is asked by default: 256, of 49,152 tokens 81, of 150,000 and more 26 and fewer."""
    return max(8, min(256, NUMBERS // vocab_size))


def spread(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Up to `budget` positions over texts of these lengths, evenly in each, the last that has a next token included.

    spread([5, 2], 4) -> [[0, 1, 3], [0]]: a short text leaves its share to the others.
    """
    room = [max(length - 1, 0) for length in lengths]  # the last token of a text has none after it
    shares = [0] * len(room)
    while (left := budget - sum(shares)) > 0 and (open_ := [i for i, n in enumerate(room) if shares[i] < n]):
        for i in open_[:left]:
            shares[i] = min(room[i], shares[i] + max(1, left // len(open_)))
    return [_even(n, share) for n, share in zip(room, shares, strict=True)]


def _even(n: int, count: int) -> list[int]:
    """`count` of the places 0 .. n - 1, evenly, the last included."""
    return [(i + 1) * n // count - 1 for i in range(count)]
