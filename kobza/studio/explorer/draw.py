"""Matrices and curves -> what an SVG needs of them: paths of equal shade, points. The templates draw, explorer.css shades."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHADES = 8


def shares(w: np.ndarray) -> list[tuple[str, str]]:
    """A matrix of shares in [0, 1] -> (class, path) of each shade, cells of 1 x 1; the root makes small shares visible."""
    return paths(np.rint(np.sqrt(w.clip(0, 1)) * SHADES).astype(int), "u")


def signed(w: np.ndarray, most: float | None = None) -> list[tuple[str, str]]:
    """The same of any numbers: blue below 0, orange above; `most` has the full shade (None: the largest)."""
    most = most or float(np.abs(w).max(initial=1e-30))
    levels = np.rint(w / most * SHADES).clip(-SHADES, SHADES).astype(int)
    return [*paths(levels, "u", "above"), *paths(-levels, "u", "below")]


def paths(levels: np.ndarray, letter: str, tail: str = "") -> list[tuple[str, str]]:
    """For each level from 1 on the cells that have it, as one path; neighbours in a row are drawn as one."""
    found = []
    for level in range(1, SHADES + 1):
        d = "".join(runs(levels == level))
        if d:
            found.append((f"{letter}{level} {tail}".strip(), d))
    return found


def runs(chosen: np.ndarray) -> list[str]:
    """Rows of True as rectangles: "M2 0h3v1h-3z"."""
    found = []
    for y, row in enumerate(chosen):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            found.append(f"M{begin} {y}h{end - begin}v1h{begin - end}z")
    return found


def curve(values: Sequence[float], low: float, high: float, width: float, height: float) -> str:
    """Points of a polyline in a box, the first value at its left edge, `high` at its top."""
    n = max(1, len(values) - 1)
    ys = [height - (value - low) / ((high - low) or 1) * height for value in values]
    return " ".join(f"{width * i / n:.1f},{y:.1f}" for i, y in enumerate(ys))
