"""The picture of a comparison: log10 of the relative L2 error at every station, forward and backward, a line a fix -> svg."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008: told apart by most colour-blind readers; the first is for the model as given
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
LEAST = 1e-9  # an error of 0 is drawn here


@dataclass(frozen=True)
class Curve:
    """A line: the error of every station, forward and (None: not measured there) backward."""

    label: str
    forward: list[float]
    backward: list[float | None]


def draw(*what: Any) -> str:
    """One svg, nothing outside it; `what` as for `picture`."""
    from kobza.pages.shell import svg_text

    return svg_text(picture(*what))


def picture(
    stations: list[str],
    curves: list[Curve],
    forced: list[float],
    forced_noise: list[float],
    noise: list[float],
    back_noise: list[float | None],
    title: str,
) -> Figure:
    """The two panels. `forced`: the error of each stretch on the reference's own input, of the model as given, and where its
    noise ends."""
    from matplotlib.figure import Figure

    from kobza.pages.shell import INK

    figure = Figure(figsize=(max(9.0, min(24.0, 0.24 * len(stations) + 5)), 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _panel(top, [(curve.label, list(curve.forward)) for curve in curves], list(noise))
    marks = dict(color=INK, markersize=5, label="as given, each stretch on the reference's input")
    top.plot(range(len(forced)), _logs(list(forced)), "x", **marks)
    top.plot(
        range(len(forced)),
        _logs(list(forced_noise)),
        "_",
        color=INK,
        markersize=9,
        label="where the noise of those ends",
    )
    top.set_title(title, loc="left", parse_math=False)  # a name may have a dollar
    _panel(bottom, [(curve.label, curve.backward) for curve in curves], back_noise)
    step = max(1, len(stations) // 60)
    bottom.set_xticks(range(0, len(stations), step), stations[::step], rotation=90, fontsize=8)
    bottom.set_xlabel("station, in the order of execution")
    for axes, word in ((top, "forward"), (bottom, "backward")):
        axes.set_ylabel(f"{word}: log10 of relative L2")
        axes.tick_params(colors=INK)
        for text in (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
    top.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False, labelcolor=INK)
    return figure


def _panel(axes: Axes, lines: list[tuple[str, list[float | None]]], noise: list[float | None]) -> None:
    """The lines over the shaded noise."""
    ceiling = _logs(noise)
    places = list(range(len(ceiling)))
    shown = [(x, y) for x, y in zip(places, ceiling, strict=True) if not math.isnan(y)]
    if shown:
        xs, ys = zip(*shown, strict=True)
        axes.fill_between(xs, ys, math.log10(LEAST), color="#BBBBBB", alpha=0.45, lw=0, label="noise of the arithmetic")
    for n, (label, values) in enumerate(lines):
        style = dict(color=COLOURS[n % len(COLOURS)], marker=MARKS[n % len(MARKS)], ms=4, lw=1.6)
        axes.plot(places, _logs(values), label=label, **style)
    axes.grid(True, axis="y", lw=0.4, color="#DDDDDD")
    axes.set_ylim(bottom=math.log10(LEAST))
    axes.margins(x=0.01)


def _logs(values: list[float] | list[float | None]) -> list[float]:
    """log10, an error below the least drawn at the least, none as a gap."""
    return [math.nan if v is None or v != v else math.log10(min(max(v, LEAST), 1e6)) for v in values]
