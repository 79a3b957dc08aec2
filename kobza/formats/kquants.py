"""The search behind ggml's blocks: numbers -> the scales, offsets and small integers that stand for them with the least error.

A run of numbers x is kept as x ~ scale * q + offset, q whole and 0 ... steps (`fit_ranged`), or as x ~ scale * q, q whole and
-half ... half - 1 (`fit_signed`). Least is the sum of w * (x - what comes back)^2. For a given q the best scale and offset are a
line through the points (q, x); which q is best is tried: the range of the run is cut in a few more or less steps than there are,
each q gets its line, the best stays. The K types keep the scales and offsets of a super-block of 256 numbers as integers too, in
units of two float16: after that rounding the integers next to each are tried, then the units are fitted again, and what made it
worse is taken back. That is ggml's objective; the tries differ, and less error than ggml's own search leaves is the measure.

Arrays here are (..., m, n): n runs side by side, the m numbers of a run along the axis before, so that numpy works along whole
cache lines. Nothing but single operations on single numbers is used, in a fixed order: the same bytes on any machine, whatever
stands beside a run. ggml.py cuts a tensor into such arrays and has the plain types.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

TRIES = tuple(np.arange(-3.4, 1, 0.2, dtype=np.float32))  # steps more than there are, when the range is cut
POLISH = 2  # times that q and the line are fitted to one another after that
SIGNED_TRIES = tuple(np.arange(-0.9, 1.0, 0.1, dtype=np.float32))
# of whole scale and offset: steps of the scale, of the offset, and of the offset that turns the line about its middle
NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (1, 0, 1), (-1, 0, -1))
EQUAL = 1e-6  # of the whole error: nothing, but it prefers the try nearest to the range itself
FLAT = 1e-6  # below, all q of a run are the same and no line is to be had


def total(a: np.ndarray) -> np.ndarray:
    """The sum of each run, (..., m, n) -> (..., 1, n); by halves, so that it does not depend on n."""
    while (m := a.shape[-2]) > 1:
        a = a[..., : m // 2, :] + a[..., m // 2 :, :]
    return a


def inverse(a: np.ndarray) -> np.ndarray:
    """1 / a, and 0 for 0 and what is as good as 0."""
    return np.divide(1, a, out=np.zeros_like(a), where=np.abs(a) > np.float32(1e-37))


def halved(a: np.ndarray) -> np.ndarray:
    """Rounded to float16."""
    return a.astype(np.float16).astype(np.float32)


def _least(error: np.ndarray, *found: np.ndarray) -> list[np.ndarray]:
    """The least error along the first axis, and what was found there."""
    best = error.argmin(0)[None]
    return [np.take_along_axis(a, best, 0)[0] for a in (error, *found)]


def fit_ranged(x: np.ndarray, w: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale >= 0 and offset <= 0 of each run; x, w (..., m, n) -> two of (..., 1, n)."""
    low = np.minimum(x.min(-2, keepdims=True), np.float32(0))
    y = x - low
    per_step = inverse(y.max(-2, keepdims=True))
    wy = w * y
    known = total(w), total(wy), -low
    sums = np.empty((3, len(TRIES) + 1, *low.shape), np.float32)
    for i, more in enumerate(TRIES):
        sums[:, i] = _sums(_whole(y * (per_step * (steps + more)), 0, steps), w, wy)
    sums[:, -1] = _sums(_whole(x * (inverse(x.max(-2, keepdims=True)) * steps), 0, steps), w, wy)  # all below 0 is 0
    lines = _line(sums, *known)
    lines[0, :-1] += np.abs(TRIES).reshape(-1, *[1] * x.ndim) * (EQUAL * total(wy * y))
    error, scale, offset = _least(*lines)
    for _ in range(POLISH):  # the q that suits the line, the line that suits the q
        q = _whole((y - offset) * inverse(scale), 0, steps)
        new = _line(np.stack(_sums(q, w, wy)), *known)
        error, scale, offset = np.where(new[0] < error, new, (error, scale, offset))
    return np.maximum(scale, 0), np.minimum(offset + low, 0)


def _sums(q: np.ndarray, w: np.ndarray, wy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of wq, wqq and wqy, for each run."""
    wq = w * q
    return total(wq), total(wq * q), total(wy * q)


def _line(sums: np.ndarray, w: np.ndarray, wy: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Error (less a constant), scale and offset <= most of the best line from q to y, from their sums (3, ..., 1, n)."""
    wq, wqq, wqy = sums
    spread = w * wqq - wq * wq
    line = spread > FLAT * w * wqq
    spread = inverse(np.where(line, spread, 0))
    offset = (wqq * wy - wq * wqy) * spread  # 0 where there is no line
    bound = ~line | (offset > most)
    offset = np.minimum(offset, most)
    scale = np.where(bound, (wqy - offset * wq) * inverse(wqq), (w * wqy - wy * wq) * spread)
    error = scale * (scale * wqq + 2 * (offset * wq - wqy)) + offset * (offset * w - 2 * wy)
    return np.stack([error, scale, offset])


def fit_signed(x: np.ndarray, w: np.ndarray, half: int) -> np.ndarray:
    """The scale of each run, of either sign; x, w (..., m, n) -> (..., 1, n)."""
    top, bottom = x.max(-2, keepdims=True), x.min(-2, keepdims=True)
    per_step = -inverse(np.where(top > -bottom, top, bottom))  # what is furthest from zero may go to -half
    wqq_sum, wqx_sum = np.empty((2, len(SIGNED_TRIES), *top.shape), np.float32)
    wx = w * x
    for i, more in enumerate(SIGNED_TRIES):
        q = _whole(x * (per_step * (half + more)), -half, half - 1)
        wqx_sum[i] = total(wx * q)
        q *= q
        wqq_sum[i] = total(w * q)
    scale = wqx_sum * inverse(wqq_sum)
    return _least(-scale * wqx_sum, scale)[1]


def _whole(q: np.ndarray, least: int, most: int) -> np.ndarray:
    """To whole numbers between the two, in place."""
    return np.clip(np.rint(q, out=q), least, most, out=q)


def weights(x: np.ndarray, counts: np.ndarray | None) -> np.ndarray:
    """What an error counts in a super-block's ranged runs, x (r, m, n). As in ggml large numbers count more, none for nothing."""
    square = x * x
    mean = total(square) / x.shape[1]
    if counts is None:
        return np.sqrt(mean) + np.abs(x)
    return counts * np.sqrt(total(mean.swapaxes(0, 1)) * 2 / len(x) + square)


def fit_super(
    x: np.ndarray,
    w: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray,
    bounds: tuple[int, int],
    ends: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The runs of a super-block with their scales and offsets in whole units of two float16.

    x, w (r, m, n): r runs of m numbers a super-block; scale, offset (r, 1, n) as found for each run. bounds of the whole scales,
    ends of q. -> unit, offset unit (1, 1, n); whole scales and offsets (r, 1, n); q (r, m, n); all float32, and x is about
    unit * scales * q - offset unit * offsets.
    """

    def tried(unit: np.ndarray, offset_unit: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
        q, error = _rounded(x, w, unit * scales, -offset_unit * offsets, ends)
        return [q, error, scales, offsets, unit, offset_unit]

    far = np.take_along_axis(scale, np.abs(scale).argmax(0)[None], 0)
    unit, offset_unit = _unit(far / (bounds[0] or bounds[1])), _unit(np.abs(offset).max(0, keepdims=True) / bounds[1])
    scales, offsets = _whole(scale * inverse(unit), *bounds), _whole(-offset * inverse(offset_unit), 0, bounds[1])
    best = tried(unit, offset_unit, scales.copy(), offsets.copy())
    turn = np.maximum(1, np.rint(unit * (ends[1] / 2) * inverse(offset_unit)))  # keeps the middle where it is
    for more, lower, turned in NEIGHBOURS if offset.any() else NEIGHBOURS[:2]:
        near = (scales + more).clip(*bounds), (offsets + (lower + turned * turn)).clip(0, bounds[1])
        best = _better(best, tried(unit, offset_unit, *near), np.positive)
    best = _better(best, tried(*_units(x, w, best[0], *best[2:4]), *best[2:4]), _runs)
    return best[4], best[5], best[2], best[3], best[0]


def _runs(error: np.ndarray) -> np.ndarray:
    """The error of a super-block, from those of its runs: (r, 1, n) -> (1, 1, n)."""
    return total(error.swapaxes(0, 1))


def _better(best: list[np.ndarray], new: list[np.ndarray], of: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """The best, overwritten where the new is better; their second entry is the error, of the runs or of all of a super-block."""
    better = of(new[1]) < of(best[1])
    for old, fresh in zip(best, new, strict=True):
        if len(better) <= len(old):  # units are no run's own
            np.copyto(old, fresh, where=better)
    return best


def _rounded(
    x: np.ndarray, w: np.ndarray, scale: np.ndarray, offset: np.ndarray, ends: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The best q for given scales and offsets (r, 1, n), and the error of each run (r, 1, n)."""
    y = x - offset
    q = _whole(y * inverse(scale), *ends)
    y -= q * scale
    y *= y
    y *= w
    return q, total(y)


def _unit(exact: np.ndarray) -> np.ndarray:
    """A float16; where those are far apart the one further out, for the largest scale must stay within reach."""
    unit = exact.astype(np.float16)
    short = np.abs(unit.astype(np.float32)) * np.float32(1.004) < np.abs(exact)
    out = np.copysign(np.inf, exact).astype(np.float16)
    return np.where(short, np.nextafter(unit, out), unit).astype(np.float32)


def _units(x: np.ndarray, w: np.ndarray, q: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> tuple:
    """The two units that suit the integers best, (1, 1, n) each: two equations, two unknowns; one without offsets."""
    wq, wx = w * q, w * x
    sums = [total(wq * q), total(wq), total(w), total(wq * x), total(wx)]
    factors = [scales * scales, scales * offsets, offsets * offsets, scales, offsets]
    qq, qm, mm, qx, mx = (total((factor * a).swapaxes(0, 1)) for factor, a in zip(factors, sums, strict=True))
    spread = qq * mm - qm * qm
    both = spread > FLAT * qq * mm
    spread = inverse(np.where(both, spread, 0))
    unit = np.where(both, (mm * qx - qm * mx) * spread, qx * inverse(qq))
    return halved(unit), halved((qm * qx - qq * mx) * spread)
