"""Memorisation: does a model know its training text by heart, and does it write it down word for word?

Two questions, a flag each, both against what held-out text of the same kind shows:
- overfit: the held-out loss is above the training loss by more than OVERFIT of itself, the whole 95% interval of the gap being
  above that. Held-out text is harder by chance as well as by ignorance, hence the margin.
- copies: more than COPIED of the characters written at temperature 1 stand in verbatim copies of the training text that are
  LONGER times as long as any stretch that held-out text shares with it, the whole 95% interval (over written texts) being above
  that. What a text says again and again stands in its held-out part too, so it is not counted.
A model is said to have memorised where either holds. Neither can be told where the held-out part repeats the training part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kobza.data import Corpus
from kobza.evals.copies import TextIndex, covered
from kobza.evals.loss import BLOCK_TOKENS, blocks, side_by_side
from kobza.evals.stats import Estimate, difference, ratio
from kobza.evals.texts import stretches
from kobza.model import GPT
from kobza.tokenizer import Tokenizer

OVERFIT = 0.25  # a model that saw its text 1.2 times shows 0.12 where another play is held out: that one is harder
COPIED = 0.01
LONGER = 2
LENGTHS = (4, 8, 16, 32, 64)  # characters of the n-grams looked up
STRETCH = 16  # contexts in a piece of training text
USUAL_CHARACTERS = 200_000  # of held-out text that are searched for what it shares with the training text


@dataclass(frozen=True)
class Gap:
    """Nats per token on training and on held-out text, their difference, and whether it is flagged."""

    train: Estimate
    held_out: Estimate
    gap: Estimate
    overfit: bool


def loss_gap(model: GPT, tokenizer: Tokenizer, corpus: Corpus, most: int = 100_000) -> Gap:
    """The gap between the losses over up to `most` tokens each of the training and the held-out part."""
    specials = list(tokenizer.specials.values())
    length = STRETCH * model.config.max_seq_len
    units = [
        _units(model, tokenizer, stretches(tokens, most, length, specials)) for tokens in (corpus.train, corpus.val)
    ]
    train, val = (ratio(*unit) for unit in units)
    gap = difference(units[1], units[0])
    return Gap(train, val, gap, gap.low is not None and gap.low > OVERFIT * val.value)


def _units(model: GPT, tokenizer: Tokenizer, pieces: list[np.ndarray]) -> tuple[list[float], list[int]]:
    """Nats and tokens of blocks."""
    length = max(BLOCK_TOKENS, model.config.max_seq_len)
    parts = [part for scored in side_by_side(model, tokenizer, pieces) for part in blocks(-scored.logprob, length)]
    return [float(part.sum()) for part in parts], [len(part) for part in parts]


@dataclass(frozen=True)
class Copies:
    """Verbatim copies of the training text in written texts. `usual`: the longest in held-out text; `share`: of written
    characters in those more than LONGER times as long; `new`, `usual_new`: {n: share of n-grams without a match} in written
    and in held-out text."""

    longest: int
    example: str
    usual: int
    share: Estimate
    new: dict[int, Estimate]
    usual_new: dict[int, Estimate]
    copies: bool


def usual_copy(index: TextIndex, held_out: str) -> int:
    """The longest stretch that held-out text shares with the indexed training text, in characters."""
    return int(index.longest(held_out[:USUAL_CHARACTERS]).max(initial=0))


def find_copies(texts: Sequence[str], index: TextIndex, pieces: Sequence[str], usual: int) -> Copies:
    """Copies of the indexed training text in written texts; pieces: held-out ones as long; usual: of `usual_copy`."""
    ours, theirs = [index.longest(text) for text in texts], [index.longest(piece) for piece in pieces]
    longest = [int(match.max(initial=0)) for match in ours]
    best = int(np.argmax(longest)) if longest else 0
    start = int(ours[best].argmax()) if longest and longest[best] else 0
    share = ratio([int(covered(match, LONGER * usual + 1).sum()) for match in ours], [len(match) for match in ours])
    return Copies(
        longest=max(longest, default=0),
        example=texts[best][start : start + longest[best]] if texts else "",
        usual=usual,
        share=share,
        new=_new(ours),
        usual_new=_new(theirs),
        copies=share.low is not None and share.low > COPIED,
    )


def _new(matches: Sequence[np.ndarray]) -> dict[int, Estimate]:
    """The share of n-grams longer than any match, by n; lengths that no text reaches are left out."""
    found = {}
    for n in LENGTHS:
        grams = [match[: len(match) - n + 1] for match in matches if len(match) >= n]
        if grams:
            found[n] = ratio([int((match < n).sum()) for match in grams], [len(match) for match in grams])
    return found


def verdict(gap: Gap | None, copies: Copies | None) -> str:
    """The two flags in words."""
    said = []
    if gap is not None and gap.overfit:
        said.append(
            f"overfit: held-out loss {gap.held_out.value:.3f} against {gap.train.value:.3f} on the training text, "
            f"a gap of more than {OVERFIT:.0%}"
        )
    if copies is not None and copies.copies:
        said.append(
            f"copies: {copies.share.value:.0%} of what it writes stands in stretches of the training text more than "
            f"{LONGER} times as long as the {copies.usual} characters that held-out text shares with it"
        )
    return "; ".join(said) or "no sign of memorisation"
