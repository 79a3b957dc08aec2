"""Train token ids -> the losses that mean something for this vocabulary and this text: `Landmarks`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOOK_AT_TOKENS = 20_000_000  # counts over more move the third decimal at most, and sorting the pairs takes seconds
DENSE_PAIRS = 1 << 22  # up to V = 2,048 a table of all pairs (32 MB) is quicker than sorting the pairs that occur


@dataclass(frozen=True)
class Landmarks:
    """Losses in nats per token that a reader of loss curves can hold on to.

    uniform           ln V: every token equally likely, nothing known
    unigram           entropy of the token frequencies: only how frequent each token is
    bigram            entropy of the next token given the one before, H(next | previous)
    mean_token_bytes  bytes of text per token, where a table of bytes was given
    mean_pair_count   how often a pair that occurs was seen on average. `bigram` reads too low by about
                      1 / (2 * mean_pair_count) nats (Miller 1955), more below 2: the text is short for the vocabulary
    """

    uniform: float
    unigram: float
    bigram: float
    mean_token_bytes: float | None = None
    mean_pair_count: float | None = None


def measure_landmarks(
    ids: np.ndarray, vocab_size: int, token_bytes: Sequence[int] | np.ndarray | None = None
) -> Landmarks:
    """Token ids (N,), vocab_size[, token_bytes (V,) bytes of each token] -> Landmarks, from the first 20M tokens.

    `measure_landmarks([0, 1, 0, 1, 0], 2)` has bigram 0: after a 0 there is always a 1. Pairs that straddle two
    documents count like any other.
    """
    ids = np.asarray(ids[:LOOK_AT_TOKENS])  # the slice first: a memmap may be huge
    check_ids(ids, vocab_size)
    ids = ids.astype(np.int64)  # bincount refuses uint64, and a small type would overflow in id * vocab_size
    counts = np.bincount(ids, minlength=vocab_size)
    pairs = count_pairs(ids, vocab_size)
    # H(next | previous) = H(pair) - H(previous); max: rounding may leave -1e-16
    bigram = max(entropy(pairs) - entropy(np.bincount(ids[:-1])), 0.0)
    return Landmarks(
        uniform=math.log(vocab_size),
        unigram=entropy(counts),
        bigram=bigram,
        mean_token_bytes=None if token_bytes is None else mean_bytes(counts, token_bytes),
        mean_pair_count=(len(ids) - 1) / len(pairs),
    )


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids that are not at least two whole numbers within the vocabulary."""
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size} but at least 2 are needed; train the tokenizer on more text")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"token ids are {ids.dtype} of shape {ids.shape}; give a one-dimensional array of integers")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens but pairs need at least 2; give more text")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"token ids run from {ids.min()} to {ids.max()} but vocab_size is {vocab_size:,}; "
            "tokenize the text again with this run's tokenizer"
        )


def count_pairs(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids (N,) int64 -> counts (P,) of the P different pairs of neighbours that occur."""
    pairs = ids[:-1] * vocab_size + ids[1:]
    if vocab_size**2 <= DENSE_PAIRS:
        counts = np.bincount(pairs)
        return counts[counts > 0]
    return np.unique(pairs, return_counts=True)[1]


def entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Counts -> entropy of their shares, in nats. `entropy([1, 1]) -> 0.693`"""
    counts = np.asarray(counts, dtype=float)
    counts = counts[counts > 0]
    total = counts.sum()
    return max(float(np.log(total) - (counts * np.log(counts)).sum() / total), 0.0)


def mean_bytes(counts: np.ndarray, token_bytes: Sequence[int] | np.ndarray) -> float:
    """Counts (V,), bytes of each token (V,) -> bytes per token of this text."""
    if len(token_bytes) != len(counts):
        raise ValueError(
            f"the table of token bytes has {len(token_bytes):,} rows but vocab_size is {len(counts):,}; "
            "make it from this run's tokenizer"
        )
    return float(np.dot(counts, token_bytes) / counts.sum())
