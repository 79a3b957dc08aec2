"""How far two engines' distributions lie apart on the same ids: the measure of the tests, beside the certificate's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kobza.config import require
from kobza.export.proof.engine import Engine
from kobza.export.proof.places import affordable, spread

LIKELY = math.log(1e-4)  # a token below it in both distributions is never drawn
FLOOR = -100.0  # of a log-probability: float32 has no smaller probability than e^-103
TIE = 1e-3  # nats between two choices, of which rounding may prefer either


@dataclass
class Difference:
    """What `compare` found over `n` positions. A token for which `other` gave no number counts as impossible to it."""

    n: int = 0
    max_logprob: float = 0.0
    """largest |difference| of a log-probability, of tokens that either of the two finds likely (1e-4)"""
    max_logprob_all: float = 0.0
    """of any token"""
    mean_kl: float = 0.0
    """KL(reference || other), nats"""
    max_kl: float = 0.0
    worst: tuple[int, int] = (0, 0)
    """(text, position) of max_kl"""
    flips: int = 0
    """positions at which another token is the likeliest"""
    ties: int = 0
    """those among the flips where the reference has the two within TIE"""
    n_next: int = 0
    """positions whose next token is known, to which the two NLLs apply; nats per token"""
    nll_reference: float = 0.0
    nll_other: float = 0.0
    missing: int = 0
    """numbers that `other` did not give"""
    texts: int = field(default=0)

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the reference and of the other, on the texts' own next tokens."""
        return math.exp(self.nll_reference), math.exp(min(self.nll_other, 700.0))


def compare(
    reference: Engine,
    other: Engine,
    texts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Hold `other` against `reference` on texts of ids, each cut to what both can take.

    positions: which of each text; by default as many as `affordable` says, spread over all. progress(done, all) after each text.
    """
    V, size = reference.vocab_size, min(reference.n_ctx, other.n_ctx)
    few = f"{other.name} has {other.vocab_size:,} tokens and {reference.name} {V:,}; the vocabulary was cut short"
    require(other.vocab_size >= V, few)
    texts = [list(ids)[:size] for ids in texts]
    chosen = spread([len(ids) for ids in texts], affordable(V)) if positions is None else positions
    found, done = Difference(), 0
    for index, (ids, places) in enumerate(zip(texts, chosen, strict=True)):
        if places:
            p, q = (engine.logprobs(ids, places) for engine in (reference, other))
            _add(found, index, ids, places, p.clamp(min=FLOOR), q[:, :V])  # rows of padding are no tokens
        done += len(places)
        if progress is not None:
            progress(done, sum(map(len, chosen)))
    require(found.n > 0, "no position to compare; give texts of at least two tokens")
    found.mean_kl /= found.n
    found.nll_reference /= max(found.n_next, 1)
    found.nll_other /= max(found.n_next, 1)
    return found


def _add(found: Difference, text: int, ids: list[int], places: Sequence[int], p: Tensor, q: Tensor) -> None:
    """Add one text's positions to the sums. p, q (n, V) log-probabilities."""
    require(not p.isnan().any(), f"the model itself computes NaN in text {text}; look for it with: kobza doctor model")
    found.missing += int(q.isnan().sum())
    q = q.nan_to_num(nan=FLOOR, neginf=FLOOR).clamp(min=FLOOR)
    gap = (p - q).abs()
    likely = torch.maximum(p, q) >= p.amax(-1, keepdim=True).clamp(max=LIKELY)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)  # (n,); rounding may leave -1e-17
    best, theirs = p.argmax(-1, keepdim=True), q.argmax(-1, keepdim=True)
    flipped = best != theirs
    near = p.gather(-1, best) - p.gather(-1, theirs) <= TIE
    if float(kl.max()) >= found.max_kl:
        found.max_kl, found.worst = float(kl.max()), (text, places[int(kl.argmax())])
    found.max_logprob = max(found.max_logprob, float(gap[likely].max()))
    found.max_logprob_all = max(found.max_logprob_all, float(gap.max()))
    found.mean_kl += float(kl.sum())
    found.flips += int(flipped.sum())
    found.ties += int((flipped & near).sum())
    rows = [row for row, place in enumerate(places) if place + 1 < len(ids)]
    following = torch.tensor([ids[places[row] + 1] for row in rows], dtype=torch.long)
    found.nll_reference -= float(p[rows, following].sum())
    found.nll_other -= float(q[rows, following].sum())
    found.n_next += len(rows)
    found.n += len(places)
    found.texts += 1
