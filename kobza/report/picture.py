"""Metric records and landmarks -> the picture of a run, as a matplotlib Figure.

Figures are made as objects, never through pyplot: nothing is shown, no state is left in the process. matplotlib is
imported inside the functions that draw, so that a server or a test may import this file cheaply.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from kobza.pages.shell import INK
from kobza.report.landmarks import Landmarks
from kobza.report.metrics import Record, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe & Ito (2008), told apart by the colour-blind; both are legible on white and on black.
TRAIN_COLOUR = "#2f8fd0"
VAL_COLOUR = "#e0661a"

MAX_POINTS = 2000  # more than the pixels across
SMOOTH_SHARE = 0.02  # of the records are averaged in the smoothed line: follows the fall, hides the batches
LABEL_GAP = 0.13  # of the height; landmark labels closer than this would overlap


def loss_figure(records: list[Record], landmarks: Landmarks | None = None) -> Figure:
    """Records -> Figure: train loss raw and smoothed, validation points, tokens on top, landmark lines if given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 4.4), facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.095, 0.13, 0.665, 0.74), facecolor="none")
    if landmarks is not None:
        draw_landmarks(axes, landmarks, *loss_range(records, landmarks))
    draw_losses(axes, records)
    set_steps(axes, records)
    dress(axes)
    return figure


# ---- what is drawn ----


def draw_losses(axes: Axes, records: list[Record]) -> None:
    """Draw train loss, raw and smoothed, and the validation points."""
    step, train = series(records, "train_loss")
    if len(train):
        marker = "o" if len(train) == 1 else "none"  # a line of one point cannot be seen
        axes.plot(*decimate(step, train), color=TRAIN_COLOUR, linewidth=0.7, alpha=0.5)
        axes.plot(*decimate(step, smooth(train)), color=TRAIN_COLOUR, linewidth=1.8, marker=marker, label="train")
    step, val = series(records, "val_loss")
    if len(val):
        size = 6 if len(val) <= 40 else 3
        axes.plot(*decimate(step, val), "o-", color=VAL_COLOUR, linewidth=1.2, markersize=size, label="validation")


def draw_landmarks(axes: Axes, landmarks: Landmarks, low: float, high: float) -> None:
    """Draw the landmark lines, labelled to the right of the axes, and set the range of losses."""
    axes.set_ylim(low, high)
    lines = [
        (landmarks.uniform, "knows nothing\nln V", (0, (1, 1.5))),
        (landmarks.unigram, "token frequencies\nunigram", (0, (4, 2))),
        (landmarks.bigram, "token pairs\nbigram", (0, (7, 2, 1, 2))),
    ]
    heights = spread([(loss - low) / (high - low) for loss, _, _ in lines], LABEL_GAP)
    leader = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 0}
    for (loss, label, dashes), height in zip(lines, heights, strict=True):
        axes.axhline(loss, color=INK, linewidth=0.9, linestyle=dashes, alpha=0.75)
        axes.annotate(
            f"{label} {loss:.2f}",
            xy=(1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(1.04, height),
            textcoords="axes fraction",
            arrowprops={**leader, "relpos": (0, 0.5)},
            va="center",
            fontsize=9.5,
            color=INK,
            annotation_clip=False,
        )


def set_steps(axes: Axes, records: list[Record]) -> None:
    """Set the range of steps and, where tokens grow evenly with steps, a second axis of tokens on top."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    first = records[0]["step"] if records else 0
    last = max(records[-1]["step"], first + 1) if records else 1
    margin = 0.015 * (last - first)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step", color=INK, loc="left")
    rate = tokens_per_step(records)
    if rate is None:
        return
    top = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda tokens: tokens / rate))
    top.xaxis.set_major_locator(MaxNLocator(5))
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.set_xlabel("tokens seen", color=INK, fontsize=9)
    top.tick_params(colors=INK, labelsize=9)
    top.spines["top"].set_visible(False)


def dress(axes: Axes) -> None:
    """Labels, legend, and fewer lines around the picture."""
    axes.set_ylabel("loss, nats per token", color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    if axes.get_legend_handles_labels()[0]:  # below the axes, where no curve and no landmark can pass through it
        axes.legend(
            frameon=False, labelcolor=INK, ncols=2, fontsize=9.5, loc="upper right", bbox_to_anchor=(1.02, -0.055)
        )
    else:
        axes.set_xlabel("no loss recorded yet")


# ---- numbers for the drawing ----


def loss_range(records: list[Record], landmarks: Landmarks) -> tuple[float, float]:
    """Records, Landmarks -> (low, high) of the loss axis: all landmarks, all losses; a diverged run is cut off."""
    losses = np.concatenate([series(records, key)[1] for key in ("train_loss", "val_loss")])
    ceiling = 1.3 * landmarks.uniform  # above it only spikes and diverged runs, which would flatten the rest
    low = min(losses.min(initial=landmarks.bigram), ceiling)
    high = min(losses.max(initial=landmarks.uniform), ceiling)
    margin = 0.06 * (high - low)
    return max(low - 2 * margin, -0.02 * high), high + margin


def tokens_per_step(records: list[Record]) -> float | None:
    """Records -> tokens of a step, or None where they are not recorded or do not grow evenly."""
    step, tokens = series(records, "tokens")
    if len(step) < 2 or tokens[-1] <= 0:
        return None
    rate = tokens[-1] / max(step[-1], 1)
    off = np.abs(tokens - rate * step).max()
    return float(rate) if off <= 0.02 * tokens[-1] + rate else None


def smooth(values: np.ndarray) -> np.ndarray:
    """Values (N,) -> running mean (N,) over 2% of them, single spikes aside.

    Near the ends the window narrows evenly on both sides, so neither end is bent.
    """
    values = without_spikes(values)
    reach = int(len(values) * SMOOTH_SHARE / 2)
    index = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + reaches + 1] - sums[index - reaches]) / (2 * reaches + 1)


def without_spikes(values: np.ndarray) -> np.ndarray:
    """Values (N,) -> running median of 5 (N,): a spike of one or two records leaves no hump in the mean."""
    if len(values) < 5:
        return values
    middle = np.median(np.lib.stride_tricks.sliding_window_view(values, 5), axis=1)
    return np.concatenate([values[:2], middle, values[-2:]])


def decimate(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x, y (N,) -> at most 2,000 of the points, the lowest and highest of 1,000 stretches: no spike hides."""
    if len(y) <= MAX_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(y)), MAX_POINTS // 2)
    kept = np.array([sorted((s[np.argmin(y[s])], s[np.argmax(y[s])])) for s in stretches]).ravel()
    return x[kept], y[kept]


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights -> heights at least `gap` apart, in the same order. `spread([0.5, 0.5], 0.1) -> [0.55, 0.45]`"""
    order = np.argsort(heights, kind="stable")[::-1]  # from the top; equal ones keep a fixed order
    placed = np.array(heights, dtype=float)
    for above, below in itertools.pairwise(order):
        placed[below] = min(placed[below], placed[above] - gap)
    placed += (np.mean(heights) - placed.mean()) if len(placed) else 0.0  # push up as much as down
    return placed.tolist()
