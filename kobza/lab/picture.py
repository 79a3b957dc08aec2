"""Report content -> matplotlib figures: learning curves with bands, differences with intervals, trend over sizes, A/A p-values.

Figures are objects, never pyplot; matplotlib is imported inside the functions that draw. All text is in INK, which the page turns
into its own text colour.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from kobza.lab.report import Content, baselines, label
from kobza.lab.statistics import engineering
from kobza.pages.shell import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart by the colour-blind; black is left out and yellow darkened to show on white
COLOURS = ("#5c6470", "#2f8fd0", "#e0661a", "#12936b", "#b0559b", "#b08c00", "#56b4e9", "#8c5a2b")
HELPS, HURTS, UNSURE = "#12936b", "#c8501e", "#7d8590"
AXES = {"steps": ("step", "step"), "tokens": ("tokens", "tokens seen"), "flops": ("flops", "FLOPs spent")}
AXES |= {"seconds": ("seconds", "seconds of training")}
AXIS_WORDS = {"nats": "held-out loss, nats per token", "bits per byte": "held-out loss, bits per byte"}


def new_figure(width: float, height: float, box: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """An empty figure of so many inches, its axes at (left, bottom, width, height) in shares."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_axes(box, facecolor="none")
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    return figure, axes


# ---- learning curves -----------------------------------------------------------------------------------------------


def curves_figure(content: Content, size: str = "") -> Figure | None:
    """The mean held-out loss of each arm of a size over what is matched, with a band of one seed-to-seed SD."""
    from matplotlib.ticker import EngFormatter

    arms = [arm for arm in content["arms"] if arm["size"] == size and arm["curve"]["mean"]]
    if not arms:
        return None
    figure, axes = new_figure(7.4, 3.9, (0.095, 0.14, 0.9 - label_room(arm["name"] for arm in arms), 0.82))
    key, words = AXES[content["budget"]["match"]]
    for i, arm in enumerate(arms):
        curve = arm["curve"]
        x, mean, sd = (np.array(curve[name]) for name in (key, "mean", "sd"))
        colour = COLOURS[i % len(COLOURS)]
        axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
        dashes = "-" if i < len(COLOURS) else "--"
        axes.plot(x, mean, dashes, marker="o", markersize=3.5, color=colour, linewidth=1.7)
    zoom(axes, [arm["curve"]["mean"] for arm in arms])
    label_ends(axes, [(arm["name"], arm["curve"][key][-1], arm["curve"]["mean"][-1]) for arm in arms])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(words, color=INK, loc="left")
    axes.set_ylabel(AXIS_WORDS[content["unit"]], color=INK)
    return figure


def zoom(axes: Axes, curves: list[list[float]]) -> None:
    """Set the range so that the ends, where the arms are compared, take the room: a first point far above may leave it."""
    ends, everything = [c[-1] for c in curves], [v for c in curves for v in c]
    low, high = min(everything), max(everything)
    middle = max((c[len(c) // 3] for c in curves), default=high)  # two thirds of each curve are seen whole
    top = min(high, max(middle, max(ends) + 0.2 * (max(ends) - low)))
    margin = 0.07 * (top - low) or 0.01
    axes.set_ylim(low - margin, top + margin)


def label_ends(axes: Axes, ends: list[tuple[str, float, float]]) -> None:
    """Name every curve at its end, in its colour, the names pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    places = spread([(y - low) / (high - low) for _, _, y in ends], 0.066)
    for i, ((name, x, y), place) in enumerate(zip(ends, places, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        axes.annotate(
            f"{shortened(name, 34)}  {y:.3f}",
            xy=(x, min(y, high)),
            xytext=(1.04, place),
            textcoords=axes.transAxes,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkB": 2, "relpos": (0, 0.5)},
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def label_room(names: Iterable[str]) -> float:
    """The share of a figure's width that labels at its right take."""
    return 0.11 + 0.0088 * max(len(shortened(name, 34)) for name in names)


def spread(heights: list[float], gap: float) -> list[float]:
    """Heights -> heights at least `gap` apart in the same order, moved as little as that takes."""
    order = np.argsort(heights, kind="stable")[::-1]
    placed = np.array(heights, dtype=float)
    for above, below in zip(order, order[1:], strict=False):
        placed[below] = min(placed[below], placed[above] - gap)
    return (placed + np.mean(heights) - placed.mean()).tolist()


def shortened(name: str, most: int) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= most else name[: most - 1] + "…"


# ---- differences ---------------------------------------------------------------------------------------------------


def differences_figure(content: Content) -> Figure | None:
    """Every comparison: its mean difference with the 95% interval, the single pairs as dots; left of zero is better."""
    found = [c for c in content["comparisons"] if c["difference"] is not None and c["half_width"] is not None]
    if not found:
        return None
    height = 0.95 + 0.42 * len(found)
    figure, axes = new_figure(7.4, height, (0.33, 0.62 / height, 0.64, 1 - 0.84 / height))
    for row, c in enumerate(reversed(found)):
        colour = (HELPS if c["difference"] < 0 else HURTS) if c["detected"] else UNSURE
        pairs = list(c["pairs"].values())
        axes.plot(pairs, [row - 0.22] * len(pairs), "o", color=colour, markersize=3, alpha=0.55, markeredgewidth=0)
        axes.plot([c["low"], c["high"]], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot([c["difference"]], [row], "D", color=colour, markersize=6)
    axes.axvline(0, color=INK, linewidth=0.9, alpha=0.8)
    noise = [c["noise"] for c in found if c["noise"]]
    if noise:
        axes.axvspan(-max(noise), max(noise), color=INK, alpha=0.07, linewidth=0)
    axes.set_yticks(range(len(found)), [shortened(label(c), 36) for c in reversed(found)])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.margins(x=0.06)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9.5)
    axes.set_xlabel(f"better  ←  difference from the baseline, {content['unit']}  →  worse", color=INK, fontsize=9.5)
    return figure


def trend_figure(content: Content) -> Figure | None:
    """The difference of every arm at every size, with the fitted lines."""
    if not content["trends"]:
        return None
    from matplotlib.ticker import NullLocator

    room = label_room(line["arm"] for line in content["trends"])
    figure, axes = new_figure(7.4, 3.5, (0.125, 0.15, 0.91 - room, 0.81))
    parameters = {size: arm["parameters"] for size, arm in baselines(content["arms"]).items()}
    ends = []
    for i, line in enumerate(content["trends"], start=1):
        colour = COLOURS[i % len(COLOURS)]
        mine = [c for c in content["comparisons"] if c["arm"] == line["arm"]]
        aside = 1.025 ** (i - (len(content["trends"]) + 1) / 2)  # else the bars would hide each other
        x = [parameters[c["size"]] * aside for c in mine]
        y, bars = [c["difference"] for c in mine], [c["half_width"] or 0 for c in mine]
        axes.errorbar(x, y, bars, fmt="D", color=colour, markersize=5)
        span = np.array([line["parameters"][0], line["parameters"][-1]])
        fitted = line["intercept"] + line["slope"] * np.log10(span)
        axes.plot(span, fitted, color=colour, linewidth=1.2, alpha=0.8)
        ends.append((line["arm"], float(span[-1]), float(fitted[-1])))
    axes.axhline(0, color=INK, linewidth=0.9, alpha=0.8)
    axes.set_xscale("log")
    axes.set_xticks(sorted(parameters.values()), [engineering(count) for count in sorted(parameters.values())])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    places = spread([(y - low) / (high - low) for _, _, y in ends], 0.07)
    for i, ((name, _, _), place) in enumerate(zip(ends, places, strict=True), start=1):
        axes.text(
            1.03,
            place,
            shortened(name, 34),
            transform=axes.transAxes,
            color=COLOURS[i % len(COLOURS)],
            fontsize=9,
            va="center",
        )
    axes.set_xlabel("parameters of the baseline", color=INK, loc="left")
    axes.set_ylabel(f"better  ←  {content['unit']}  →  worse", color=INK)
    return figure
