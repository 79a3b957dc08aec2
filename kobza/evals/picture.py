"""Evaluations of a run's checkpoints -> eval.png: loss by position in the context, and each measure over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kobza.evals.evaluation import Evaluation
from kobza.evals.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR, REAL = "#2f8fd0", "#e0661a"  # blue and vermilion of Okabe & Ito (2008), as in the report
COLUMNS = 3


def eval_figure(steps: Sequence[int], evaluations: Sequence[Evaluation]) -> Figure:
    """Steps and their evaluations -> a figure of small panels that share their look."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = [i for i, m in enumerate(evaluations[0].measures) if all(e.measures[i].estimate for e in evaluations)]
    n = 2 + len(kept)
    rows = -(-n // COLUMNS)
    figure = Figure(figsize=(3.6 * COLUMNS, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    draw_positions(axes[0], steps, evaluations)
    draw_course(axes[1], steps, [e.loss.bits_per_byte for e in evaluations], None, "bits per byte")
    for panel, i in zip(axes[2:], kept, strict=False):
        column = [e.measures[i] for e in evaluations]
        estimates = [m.estimate for m in column if m.estimate]
        draw_course(panel, steps, estimates, column[-1].reference, f"{column[0].name}, {column[0].unit}")
    for spare in axes[n:]:
        spare.axis("off")
    return figure


def draw_positions(axes: Axes, steps: Sequence[int], evaluations: Sequence[Evaluation]) -> None:
    """A line a checkpoint, later ones darker."""
    for i, (step, e) in enumerate(zip(steps, evaluations, strict=True)):
        x = [(p.first * p.last) ** 0.5 for p in e.positions]
        ends = i in (0, len(evaluations) - 1)
        strength = 0.25 + 0.75 * (i + 1) / len(evaluations)
        label = f"step {step:,}" if ends else None
        axes.plot(x, [p.nats_per_token.value for p in e.positions], color=COLOUR, alpha=strength, label=label)
    axes.set_xscale("log", base=2)
    axes.set_title("nats per token, by tokens seen before", fontsize=9, loc="left")
    axes.legend(frameon=False, fontsize=8)
    dress(axes)


def draw_course(
    axes: Axes, steps: Sequence[int], estimates: Sequence[Estimate], reference: float | None, title: str
) -> None:
    """One measure over the steps with its interval, and what real text shows."""
    axes.plot(steps, [e.value for e in estimates], color=COLOUR, marker="o", markersize=3)
    low = [e.value if e.low is None else e.low for e in estimates]
    high = [e.value if e.high is None else e.high for e in estimates]
    axes.fill_between(steps, low, high, color=COLOUR, alpha=0.2, linewidth=0)
    if reference is not None:
        axes.axhline(reference, color=REAL, linestyle="--", linewidth=1, label="real text")
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    dress(axes)


def dress(axes: Axes) -> None:
    """Fewer lines around a panel."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def write_picture(path: Path, steps: Sequence[int], evaluations: Sequence[Evaluation]) -> None:
    """Write the figure as PNG."""
    eval_figure(steps, evaluations).savefig(path, format="png", dpi=130, facecolor="white")
