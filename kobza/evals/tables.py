"""An evaluation -> tables and lines for a person."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from kobza.evals.evaluation import Evaluation
from kobza.evals.measures import Measure
from kobza.evals.memorise import LONGER, verdict
from kobza.evals.stats import Estimate
from kobza.evals.tasks import Judged, accuracy

MOST_ROWS = 12  # of documents shown; --json has all
EXAMPLE = 60  # characters of a copied passage that are shown


def shown(e: Estimate | None, digits: int = 3) -> str:
    """A number with its interval. shown(Estimate(0.5, 0.4, 0.6, 9), 2) -> "0.50 [0.40, 0.60]" """
    if e is None or not math.isfinite(e.value):
        return "-"
    if e.low is None or e.high is None:
        return f"{e.value:,.{digits}f}"
    return f"{e.value:,.{digits}f} [{e.low:,.{digits}f}, {e.high:,.{digits}f}]"


def make_table(*columns: str, title: str = "") -> Table:
    """An empty table in the house's style: the first column to the left, the others to the right."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    return table


def evaluation_tables(e: Evaluation) -> Iterator[RenderableType]:
    """Loss, loss by position and by document, measures, memorisation."""
    loss = make_table("loss (95% intervals)", "", title="")
    for name, estimate in (
        ("bits per byte", e.loss.bits_per_byte),
        ("nats per token", e.loss.nats_per_token),
        ("perplexity", e.loss.perplexity),
        ("next token right", e.loss.accuracy),
    ):
        loss.add_row(name, shown(estimate))
    yield loss
    position = make_table("tokens seen before", "nats per token")
    for p in e.positions:
        position.add_row(f"{p.first}" if p.first == p.last else f"{p.first}-{p.last}", shown(p.nats_per_token))
    yield position
    if e.documents:
        yield document_table(e.documents)
    yield measure_table(e.measures)
    yield from memorisation_lines(e)


def document_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The documents with the highest loss first."""
    ordered = sorted(rows, key=lambda row: -row["bits_per_byte"]["value"])
    table = make_table("document, hardest first", "tokens", "bits per byte", "nats per token")
    for row in ordered[:MOST_ROWS]:
        figures = (shown(Estimate(**row[key])) for key in ("bits_per_byte", "nats_per_token"))
        table.add_row(escape(row["source"]), f"{row['tokens']:,}", *figures)
    if len(rows) > MOST_ROWS:
        table.add_row(f"and {len(rows) - MOST_ROWS} more (--json has all)", "", "", "")
    return table


def measure_table(measures: Sequence[Measure]) -> Table:
    """The measures with what real text shows."""
    table = make_table("measure", "model", "real text", "better")
    aims = {"up": "up", "down": "down", "reference": "to real"}
    for m in measures:
        real = "" if m.reference is None else f"{m.reference:.3f}"
        value = shown(m.estimate) if m.estimate else f"not measured: {m.why}"
        table.add_row(m.name if m.unit == "share" else f"{m.name} ({m.unit})", escape(value), real, aims[m.aim])
    return table


def memorisation_lines(e: Evaluation) -> Iterator[RenderableType]:
    """The gap, copies, and the verdict."""
    if e.gap is None or e.copies is None:
        yield "memorisation: not measured, the training text lies in the run's folder"
        return
    c = e.copies
    table = make_table("new n-grams: characters", "model", "held-out text")
    for n, estimate in c.new.items():
        table.add_row(str(n), shown(estimate), shown(c.usual_new.get(n)))
    yield table
    yield f"gap           held-out - training loss: {shown(e.gap.gap)} nats per token".replace("[", r"\[")
    example = escape(repr(c.example[:EXAMPLE])) + ("..." if len(c.example) > EXAMPLE else "")
    yield f"longest copy  {c.longest} characters (held-out text: {c.usual}): {example}"
    yield f"copied        {shown(c.share)} of what it writes, in copies more than {LONGER} times as long as that".replace(
        "[", r"\["
    )
    yield f"[bold]memorised     {'yes' if e.memorised else 'no'}[/bold]: {escape(verdict(e.gap, e.copies))}"


def checkpoint_table(steps: Sequence[int], evaluations: Sequence[Evaluation], trends: dict[str, Any]) -> Table:
    """A row a checkpoint, a column a measure; below, how each moves."""
    measures = [m.name for m in evaluations[0].measures]
    table = make_table("step", "bits per byte", *measures, "gap", "longest copy")
    for step, e in zip(steps, evaluations, strict=True):
        cells = [shown(m.estimate).replace(" [", "\n[") for m in e.measures]
        gap = "-" if e.gap is None else f"{e.gap.gap.value:.3f}" + " !" * e.gap.overfit
        longest = "-" if e.copies is None else f"{e.copies.longest}" + " !" * e.copies.copies
        bpb = shown(e.loss.bits_per_byte).replace(" [", "\n[")
        table.add_row(f"{step:,}", *(escape(cell) for cell in (bpb, *cells)), gap, longest)
    table.add_section()
    names = ["bits per byte", *measures]
    references = ["", *("" if m.reference is None else f"{m.reference:.3f}" for m in evaluations[-1].measures)]
    table.add_row("real text", *references, "", "")
    table.add_row("rank correlation", *(f"{trends[n]['spearman']:.2f}" if n in trends else "-" for n in names), "", "")
    table.add_row("steps back", *(str(trends[n]["backward"]) if n in trends else "-" for n in names), "", "")
    table.add_row("beyond noise", *(str(trends[n]["beyond_noise"]) if n in trends else "-" for n in names), "", "")
    return table


def task_table(judged: Sequence[Judged], title: str) -> Table:
    """Accuracies with Wilson's intervals."""
    found = accuracy(judged)
    table = make_table(title, "right", "of", "chance")
    if found.choices.n:
        chance = f"{found.chance:.3f}"
        table.add_row("choices, likeliest", shown(found.choices), str(found.choices.n), chance)
        table.add_row("choices, likeliest a character", shown(found.choices_by_length), str(found.choices.n), chance)
    if found.generation.n:
        table.add_row("generation", shown(found.generation), str(found.generation.n), "")
    return table
