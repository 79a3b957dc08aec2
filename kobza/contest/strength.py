"""How strong each entry is, from votes on pairs: Bradley & Terry 1952, P(a beats b) = 1 / (1 + exp(strength_b - strength_a)).

A tie counts as half a win for each. Every strength has a weak prior, normal around 0 with standard deviation PRIOR (two entries
PRIOR apart: the stronger wins nine votes in ten), so an entry that never lost, or was never compared, has a finite strength
and an interval that says how little is known. Strengths are relative to the mean of all. The intervals are the posterior's normal
approximation; they take votes as independent, so a crowd of one mind makes them too narrow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

PRIOR = 2.2
Z = 1.959964  # of a 95% interval
STEPS, CLOSE = 100, 1e-10


class Strength(NamedTuple):
    """An estimate in nats of odds, relative to the mean, with its 95% interval."""

    value: float
    low: float
    high: float


def strengths(n: int, votes: Iterable[tuple[int, int, float]]) -> list[Strength]:
    """The strengths of entries 0..n-1. votes: (a, b, share of the win that a has: 1, 0.5 or 0); in any order the same bits."""
    wins = np.zeros((n, n))
    for a, b, share in votes:
        wins[a, b] += share
        wins[b, a] += 1 - share
    if n == 0:
        return []
    theta, precision = _fit(wins)
    centre = np.eye(n) - 1 / n
    spread = Z * np.sqrt(np.diag(centre @ np.linalg.inv(precision) @ centre).clip(0))
    value = theta - theta.mean()
    return [Strength(float(v), float(v - s), float(v + s)) for v, s in zip(value, spread, strict=True)]


def _fit(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """wins (n, n) -> the posterior's mode (n,) and its curvature there (n, n), by Newton's method with halved steps."""
    counts, theta = wins + wins.T, np.zeros(len(wins))
    for _ in range(STEPS):
        odds = theta[:, None] - theta[None]
        p = 1 / (1 + np.exp(-odds))
        slope = (wins - counts * p).sum(1) - theta / PRIOR**2
        weight = counts * p * (1 - p)
        precision = np.diag(weight.sum(1) + 1 / PRIOR**2) - weight
        step = np.linalg.solve(precision, slope)
        theta = theta + step * min(1.0, 2 / max(np.abs(step).max(), 1e-300))  # at most 2 nats: no overshoot from afar
        if np.abs(step).max() < CLOSE:
            break
    return theta, precision
