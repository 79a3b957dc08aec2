"""Which words of one text stand in another: hashes of runs of words, by numpy, block by block.

Words are runs of letters and digits in lower case; what parts them does not count, so a text that was re-wrapped or
re-punctuated is the same. Where words are no measure (Chinese, base64, one endless line), every character is a word of its own
and the runs are longer. A run is known by a 64-bit hash: among 100 million of them, one in a hundred thousand texts would meet
another by chance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

BASE, STEP = 0x9E3779B97F4A7C15 | 1, 0xC2B2AE3D27D4EB4F | 1  # odd, so invertible modulo 2**64
INVERSE = pow(BASE, -1, 1 << 64)
LONG_WORD = 20  # mean bytes of a "word" above which characters are counted instead


@dataclass(frozen=True)
class Words:
    """The words of a text: a hash each, and where each begins and ends in `raw` (its lower-case UTF-8)."""

    raw: np.ndarray
    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def text(self, first: int, last: int) -> str:
        """The text from word `first` to word `last`."""
        return self.raw[self.starts[first] : self.ends[last]].tobytes().decode("utf-8", "replace")


def words_of(text: str, characters: bool = False) -> Words:
    """The Words of a text; `characters`: each character that is no white space is one."""
    text = text.lower() if text.isascii() else _SIGNS.sub(" ", text.lower())
    raw = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    inside = (raw >= 0x80) | _ALNUM[raw]
    if characters:
        starts = np.flatnonzero((raw & 0xC0 != 0x80) & ~_SPACE[raw])
        ends = np.append(starts[1:], len(raw)) if len(starts) else starts
        lengths = 1 + (raw[starts] >= 0xC0) + (raw[starts] >= 0xE0) + (raw[starts] >= 0xF0)
        ends = np.minimum(ends, starts + lengths)
    else:
        edges = np.diff(inside.astype(np.int8), prepend=0, append=0)
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return Words(raw, _span_hashes(raw, starts, ends), starts, ends)


def counts_characters(text: str) -> bool:
    """Whether words are no measure of this text."""
    raw = np.frombuffer(text[: 1 << 20].encode("utf-8", "surrogatepass"), np.uint8)
    n = int((np.diff(((raw >= 0x80) | _ALNUM[raw]).astype(np.int8), prepend=0) == 1).sum())
    return len(raw) > LONG_WORD * 20 and len(raw) > LONG_WORD * max(n, 1)


_SIGNS = re.compile("[\u00a0-\u00bf\u2000-\u206f\u3000-\u303f]")  # quotation marks, dashes and blanks beyond ASCII
_CODES = np.arange(256)
_ALNUM = np.array([chr(c).isalnum() and c < 128 for c in _CODES])
_SPACE = np.array([c in b" \t\r\n\f\v" for c in _CODES])


def _powers(base: int, n: int) -> np.ndarray:
    powers = np.full(n, base, np.uint64)
    if n:
        powers[0] = 1
    return np.multiply.accumulate(powers)  # modulo 2**64: that is what uint64 does


def _span_hashes(raw: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A hash of raw[start:end] for each pair: differences of one running sum, brought back to a common power."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    sums = np.concatenate(
        [np.zeros(1, np.uint64), np.cumsum((raw.astype(np.uint64) + np.uint64(1)) * _powers(BASE, len(raw)))]
    )
    spans = (sums[ends] - sums[starts]) * _powers(INVERSE, len(raw))[starts]
    return _mixed(spans)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A finalizer (MurmurHash3's): every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of n hashes, len - n + 1 of them."""
    if len(hashes) < n:
        return np.zeros(0, np.uint64)
    made, length, power = np.zeros(len(hashes) + 1, np.uint64), 0, 1  # the empty run from each place
    double, span, step = hashes, 1, STEP  # runs of 1, 2, 4, ... and STEP to that power
    while True:
        if n & span:  # a run of `length`, and behind it one of `span`
            made = made[: len(double) - length] + double[length:] * np.uint64(power)
            length, power = length + span, power * step % (1 << 64)
        if length == n:
            return _mixed(made)
        double = double[:-span] + double[span:] * np.uint64(step)
        span, step = 2 * span, step * step % (1 << 64)


def streamed(blocks: Iterable[str], characters: bool, lengths: tuple[int, ...]) -> Iterator[tuple[np.ndarray, ...]]:
    """The runs of each length, block by block; a run may begin in one block and end in the next."""
    left = np.zeros(0, np.uint64)
    for block in blocks:
        hashes = np.concatenate([left, words_of(block, characters).hashes])
        yield tuple(runs(hashes[max(len(left) - n + 1, 0) :] if len(left) else hashes, n) for n in lengths)
        left = hashes[max(len(hashes) - max(lengths) + 1, 0) :]


def found_in(wanted: np.ndarray, streams: Iterable[np.ndarray]) -> np.ndarray:
    """Of each element of `wanted`, whether it is in one of the arrays -> bool, as long as `wanted`."""
    known, back = np.unique(wanted, return_inverse=True)
    met = np.zeros(len(known), bool)
    if not len(known):
        return met[back]
    bits = min(
        max(len(known).bit_length() + 5, 10), 26
    )  # a table of the first bits, most of it empty, spares most searches
    table, shift = np.zeros(1 << bits, bool), np.uint64(64 - bits)
    table[known >> shift] = True
    for array in streams:
        maybe = array[table[array >> shift]]
        places = np.minimum(np.searchsorted(known, maybe), len(known) - 1)
        met[places[known[places] == maybe]] = True
    return met[back]


def covered(found: np.ndarray, n: int) -> np.ndarray:
    """Which words lie in a run that was found: found (len - n + 1,) -> (len,)."""
    depth = np.zeros(len(found) + n, np.int64)
    depth[: len(found)] += found
    depth[n:] -= found
    return np.cumsum(depth)[:-1] > 0


def longest(flags: np.ndarray) -> tuple[int, int]:
    """First and last index of the longest stretch of True; (0, -1) where there is none."""
    edges = np.diff(flags.astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return 0, -1
    i = int(np.argmax(ends - starts))
    return int(starts[i]), int(ends[i]) - 1


def line_hashes(text: str, least: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash, bytes) of each line of at least `least` bytes, blanks at its ends apart."""
    raw = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    breaks = np.flatnonzero(raw == 10)
    starts, ends = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(raw)]])
    long = ends - starts >= least
    starts, ends = starts[long].astype(np.int64), ends[long].astype(np.int64)
    return _span_hashes(raw, starts, ends), ends - starts
