"""The X-ray as colours in a terminal, as one HTML page, and as numbers for a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

from kobza.finetune.example import Row
from kobza.finetune.xray import Remark, Xray, histogram
from kobza.pages.shell import printable, render

Piece = Callable[[int], str]  # an id -> its text, or its name if it is special
MOST_TOKENS = 400  # of a row that are drawn
COLOURS = {"error": "bold red", "warn": "yellow", "info": "dim"}
WORDS = {"error": "ERROR", "warn": "warning", "info": "note"}

PAGE = """{% extends "shell" %}
{% block style %}main { max-width: 62rem; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 0.9rem/1.7 ui-monospace, Menlo, Consolas, monospace; }
.row span { border-radius: 0.2rem; } .masked { color: var(--quiet); }
.learned { background: var(--tint); color: var(--mark); font-weight: 600; box-shadow: inset 0 -2px var(--mark); }
.end { outline: 1px solid var(--good); color: var(--good); }
.remark { border-left: 0.3rem solid var(--quiet); } .remark.warn, .remark.error { border-left-color: var(--mark); }
.remark.error { background: var(--tint); }
.bars { display: flex; align-items: flex-end; gap: 1px; height: 6rem; } .bars div { flex: 1; background: var(--mark); }
.axis { display: flex; justify-content: space-between; }{% endblock %}
{% block body %}<h1>{{ title }}</h1>
<dl class="numbers">
{% for name, value in numbers %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% for remark in remarks %}<div class="card remark {{ remark.severity }}">
<strong>{{ words[remark.severity] }} {{ remark.code }}</strong> {{ printable(remark.text) }}</div>
{% endfor %}
<h2>Rows: <span class="row"><span class="learned">learned</span> <span class="masked">masked</span>
<span class="learned end">the end of an answer</span></span></h2>
{% for row in rows %}<div class="card"><p class="quiet">{{ row.where }}: {{ row.n }} tokens, {{ row.learned }} learned
{%- if row.cut %}, {{ row.cut }} cut{% endif %}</p>
<div class="row">{% for kind, text in row.runs %}<span class="{{ kind }}">{{ text }}</span>{% endfor %}
{%- if row.more %}<span class="masked"> … {{ row.more }} more tokens</span>{% endif %}</div></div>
{% endfor %}
<h2>Lengths in tokens</h2>
<div class="bars" role="img" aria-label="rows by length">{% for n, share in bars %}<div style="height: {{ share }}%"
 title="{{ n }}"></div>{% endfor %}</div><div class="axis quiet"><span>0</span><span>{{ longest }}</span></div>{% endblock %}
"""


def numbers(xray: Xray) -> list[tuple[str, str]]:
    """What was counted, for a person."""
    t, v = xray.train, xray.val
    return [
        ("rows", f"{t.rows:,} to learn, {v.rows:,} held out"),
        ("tokens", f"{t.tokens:,}, of which {t.learned:,} ({t.learned / max(1, t.tokens):.1%}) are learned"),
        ("lengths", "shortest {}, median {}, 95% up to {}, longest {}".format(*t.lengths)),
        ("cut", f"{t.cut + v.cut:,} rows ({(t.cut + v.cut) / max(1, t.rows + v.rows):.1%})"),
        ("nothing to learn", f"{t.nothing + v.nothing:,} rows"),
        ("repeated", f"{t.twice:,} rows; held out and yet learned: {xray.seen:,}"),
        ("ends learned", f"{xray.ended:,} of {xray.answers:,} answers ({xray.ended / max(1, xray.answers):.0%})"),
    ]


def runs_of(row: Row, piece: Piece, ends: Sequence[int]) -> list[tuple[str, str]]:
    """A row as stretches of one colour: [("masked", "<|im_start|>user..."), ("learned", "yes"), ("learned end", "<|im_end|>")]"""
    runs: list[tuple[str, str]] = []
    for i, learned in zip(row.ids[:MOST_TOKENS].tolist(), row.learned[:MOST_TOKENS].tolist(), strict=True):
        kind = ("learned end" if i in ends else "learned") if learned else "masked"
        text = printable(piece(i))
        if runs and runs[-1][0] == kind:
            runs[-1] = (kind, runs[-1][1] + text)
        else:
            runs.append((kind, text))
    return runs


def row_text(row: Row, piece: Piece, ends: Sequence[int]) -> Text:
    """A row in a terminal's colours."""
    styles = {"masked": "dim", "learned": "bold green", "learned end": "bold green reverse"}
    text = Text()
    for kind, part in runs_of(row, piece, ends):
        text.append(part, style=styles[kind])
    more = len(row.ids) - MOST_TOKENS
    return text.append(f" … {more} more tokens", style="dim") if more > 0 else text


def remark_text(remark: Remark) -> Text:
    """A remark in a terminal's colours."""
    return Text(f"{WORDS[remark.severity]} {remark.code}  {printable(remark.text)}", style=COLOURS[remark.severity])


def page(title: str, xray: Xray, train: Sequence[Row], piece: Piece, ends: Sequence[int]) -> str:
    """The page."""
    bars = histogram(train)
    most = max(n for _, n in bars)
    rows = [
        {"where": printable(row.where), "n": len(row.ids), "learned": int(row.learned.sum()), "cut": row.cut}
        | {"runs": runs_of(row, piece, ends), "more": max(0, len(row.ids) - MOST_TOKENS)}
        for row in xray.shown
    ]
    return render(
        PAGE,
        title=printable(title),
        numbers=numbers(xray),
        remarks=xray.remarks,
        words=WORDS,
        printable=printable,
        rows=rows,
        bars=[(f"{start} tokens and more: {n} rows", round(100 * n / most)) for start, n in bars],
        longest=xray.train.lengths[3],
    )


def figures(xray: Xray) -> dict[str, Any]:
    """What was counted, for a script."""
    found = asdict(xray)
    del found["shown"]
    return found
