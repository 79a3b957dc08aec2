"""Logits -> the next id of each row of a mixed batch: the very ids that `kobza.generate` draws from the same logits and seed.

What depends on a row (bias, penalties, what its constraint allows) is done a row at a time by generate's own knobs. The rest,
temperature, top-k, top-p and min-p, costs generate a sort and a float64 softmax of the whole vocabulary. Here rows with equal
settings go together, and a large vocabulary is first cut to a hundred candidates. Whether those suffice, and whether another
order of summing could have changed the draw, is checked on every token; where it could, generate's own way is taken.

Shapes: n rows, V vocab_size, m candidates of a row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kobza.config import SampleConfig
from kobza.generate import NEVER, Processor, draw, processors

SMALL = 4096  # up to here the whole vocabulary costs no more than finding candidates
LANES = 64  # logits whose maximum stands for them while candidates are sought
CLOSE = 1e-5  # of a probability: more than generate's float32 sums can be off by
EDGE = 1e-9  # the same of its float64 ones
CANDIDATES = (64, 512)  # tried in turn where top-k does not say how many


class Knobs(NamedTuple):
    """What rows must have in common to be drawn together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


class Sampler:
    """How one row chooses: its knobs, and a uniform draw for each token it may write, from its own seed."""

    def __init__(
        self,
        config: SampleConfig,
        n_prompt: int,
        ends: Sequence[int] = (),
        bias: Mapping[int, float] | None = None,
        extra: Sequence[Processor] = (),
    ):
        self.knobs = Knobs(config.temperature, config.top_k, config.top_p, config.min_p)
        greedy = replace(config, temperature=0.0)  # of it, `processors` gives those that depend on the row
        self.of_row = [*extra, *processors(greedy, ends, [n_prompt])]
        self.tail = processors(replace(config, repetition_penalty=1.0, no_repeat_ngram=0, min_tokens=0), (), [])
        generator = torch.Generator().manual_seed(config.seed)
        self.uniform = torch.rand(config.tokens, generator=generator, dtype=torch.float64).tolist()
        self.bias_ids = torch.tensor(list(bias or ()), dtype=torch.long)
        self.bias = torch.tensor(list((bias or {}).values()), dtype=torch.float32)

    def shape(self, logits: Tensor, ids: list[int], allowed: Tensor | None = None) -> Tensor:
        """Raw logits (V,) -> after all that depends on the row: `ids`, its tokens so far, and what a constraint allows (V,)."""
        if len(self.bias_ids):
            logits = logits.index_add(0, self.bias_ids, self.bias)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, NEVER)
        shaped = logits[None]
        for process in self.of_row:
            shaped = process(shaped, [ids])
        # a constraint that allows an end alone wins over min_tokens
        return logits if allowed is not None and not shaped.isfinite().any() else shaped[0]

    def probabilities(self, shaped: Tensor) -> Tensor:
        """Shaped logits (V,) -> what the row draws from (V,), float64; at temperature 0 all on the likeliest."""
        if self.knobs.temperature == 0:
            return torch.zeros_like(shaped, dtype=torch.float64).index_fill_(0, shaped.argmax(), 1.0)
        return whole(self, shaped[None]).double().softmax(-1)[0]


def whole(sampler: Sampler, shaped: Tensor) -> Tensor:
    """Shaped logits (n, V) -> after temperature, top-k, top-p and min-p, generate's way (n, V)."""
    for process in sampler.tail:
        shaped = process(shaped, [])
    return shaped


def choose(samplers: Sequence[Sampler], shaped: Tensor, places: Sequence[int]) -> list[int]:
    """Shaped logits (n, V) -> an id a row; places[i] counts the tokens that row i has written."""
    chosen = [0] * len(samplers)
    groups = defaultdict(list)
    for i, sampler in enumerate(samplers):
        groups[sampler.knobs].append(i)
    for knobs, rows in groups.items():
        logits = shaped if len(rows) == len(samplers) else shaped[rows]
        if knobs.temperature == 0:
            ids = logits.argmax(-1).tolist()
        else:
            ids = sample(samplers[rows[0]], logits, [samplers[i].uniform[places[i]] for i in rows])
        for i, drawn in zip(rows, ids, strict=True):
            chosen[i] = drawn
    return chosen


def sample(sampler: Sampler, shaped: Tensor, uniform: list[float]) -> list[int]:
    """An id a row at a temperature above 0. shaped (n, V), a uniform a row -> n ids."""
    knobs, V = sampler.knobs, shaped.shape[-1]
    sizes = (knobs.top_k,) if knobs.top_k else CANDIDATES if knobs.top_p < 1 or knobs.min_p else ()
    ids: list[int | None] = [None] * len(uniform)
    if V > SMALL:
        scaled = shaped if knobs.temperature == 1 else shaped / knobs.temperature
        for size in (size for size in sizes if 4 * size * LANES <= V):
            rows = [i for i, drawn in enumerate(ids) if drawn is None]
            for i, found in zip(rows, candidates(scaled, rows, size), strict=True):
                ids[i] = pick(*found, scaled[i], knobs, uniform[i])
    for i in (
        i for i, drawn in enumerate(ids) if drawn is None
    ):  # one by one: a row in float64 fills a processor's cache
        ids[i] = int(draw(whole(sampler, shaped[i : i + 1]), torch.tensor([uniform[i]], dtype=torch.float64)))
    return ids  # type: ignore[return-value]


def candidates(logits: Tensor, rows: list[int], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, logits), ids ascending, of each row's k likeliest and a few more: all that reach the k-th largest of the maxima of
    64 logits each, for k logits at least reach it."""
    V, found = logits.shape[-1], []
    maxima = logits[:, : V // LANES * LANES].unflatten(-1, (-1, LANES)).amax(-1)  # (n, V / 64)
    floors = maxima.topk(k).values[:, -1].tolist()
    for i in rows:
        row = logits[i].numpy()
        ids = np.flatnonzero(row >= floors[i])
        found.append((ids, row[ids]))
    return found


def pick(ids: np.ndarray, scores: np.ndarray, row: Tensor, knobs: Knobs, uniform: float) -> int | None:
    """The id that generate would draw from the row (V,), told from its candidates (m,), or None where they cannot tell."""
    best = float(scores.max())
    mass = np.exp(scores.astype(np.float64) - best)  # times a constant, the probability
    if not math.isfinite(best) or len(scores) > 8 * CANDIDATES[-1]:
        return None
    if knobs.top_k:
        mass[scores < np.partition(scores, -knobs.top_k)[-knobs.top_k]] = 0
    if knobs.top_p < 1:
        total = mass.sum() if knobs.top_k else math.exp(float(row.logsumexp(0)) - best)
        order = np.argsort(-mass, kind="stable")
        ordered = mass[order] / total
        before = ordered.cumsum() - ordered  # probability of all likelier tokens
        enough = knobs.top_k or before[-1] + ordered[-1] > knobs.top_p + CLOSE
        if not enough or np.abs(before - knobs.top_p).min() < CLOSE:
            return None
        mass[order[before >= knobs.top_p]] = 0
    if knobs.min_p:
        complete = knobs.top_k or knobs.top_p < 1 or mass.min() < knobs.min_p * (1 - CLOSE)
        if not complete or np.abs(mass[mass > 0] - knobs.min_p).min() < CLOSE * knobs.min_p:
            return None
        mass[mass < knobs.min_p] = 0
    cumulative = mass.cumsum()
    target = uniform * cumulative[-1]
    if np.abs(cumulative - target).min() < EDGE * cumulative[-1]:
        return None
    return int(ids[(cumulative <= target).sum()])


def logprob_of(logits: Tensor, chosen: int, k: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The chosen id's log-probability and the k likeliest ids with theirs, in the model's own distribution. Raw logits (V,)."""
    total = logits.logsumexp(-1)
    top = logits.topk(k)
    rivals = zip(top.indices.tolist(), (top.values - total).tolist(), strict=True)
    return float(logits[chosen] - total), tuple(rivals)
