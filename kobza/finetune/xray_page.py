"""The X-ray as colours in a terminal, as one HTML page, and as numbers for a script.

What stands in a person's file is shown as text and does nothing: markup is escaped, control characters and ANSI sequences become
U+FFFD, and what hides or turns text about (zero width, bidirectional overrides, tags) is spelled out. The page shows each token
by itself, with its id; tokens that make one character together stand together.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any, NamedTuple

from rich.text import Text

from kobza.finetune.example import Row
from kobza.finetune.xray import Remark, Xray, histogram
from kobza.pages.shell import printable, render

Piece = Callable[[int], str | bytes]  # an id -> its bytes, or its name if it is special
EDGE = 80  # tokens shown at both ends of a long stretch of one kind
MOST_TOKENS = 1200  # of a row that are shown
COLOURS = {"error": "bold red", "warn": "yellow", "info": "dim"}
WORDS = {"error": "ERROR", "warn": "warning", "info": "note"}
HIDDEN = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]")

PAGE = """{% extends "shell" %}
{% block style %}main { max-width: 62rem; }
.numbers { grid-template-columns: repeat(auto-fit, minmax(min(13rem, calc(50% - 0.3rem)), 1fr)); }
.numbers dd { font-size: 1.5rem; line-height: 1.3; } .numbers .quiet { font-size: 0.85rem; line-height: 1.35; }
.row { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 0.9rem/1.8 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
.row span { padding: 0.1rem 0; box-shadow: inset 1px 0 var(--line); } .row span:hover { background: var(--line); }
.masked { color: var(--quiet); }
.row .learned { background: var(--tint); color: var(--mark); font-weight: 600;
  box-shadow: inset 1px 0 var(--ground), inset 0 -2px var(--mark); }
.row .end { background: var(--good); color: var(--card); box-shadow: none; border-radius: 0.2rem; padding: 0.1rem 0.2rem; }
.row .gap { color: var(--quiet); font-family: system-ui, sans-serif; font-style: italic; box-shadow: none; padding: 0 0.4rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; align-items: baseline; }
.verdict { font-weight: 600; color: var(--good); } .verdict.error { color: var(--mark); }
.remark { border-left: 0.3rem solid var(--line); } .remark.warn, .remark.error { border-left-color: var(--mark); }
.remark.error { background: var(--tint); } .remark strong { color: var(--quiet); }
.remark.warn strong, .remark.error strong { color: var(--mark); }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 7rem; border-bottom: 1px solid var(--line); }
.bars div { flex: 1; background: var(--mark); border-radius: 2px 2px 0 0; } .bars div:hover { background: var(--ink); }
.axis { display: flex; justify-content: space-between; }{% endblock %}
{% block body %}<h1>{{ title }}</h1>
<p class="verdict {{ "error" if refused }}">{{ "These rows cannot teach; see below." if refused
 else "Nothing here forbids to start." }}</p>
<dl class="numbers">
{% for name, value, more in tiles %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd><dd class="quiet">{{ more }}</dd></div>
{% endfor %}</dl>
{% for severity, head, text in remarks %}<div class="card remark {{ severity }}"><strong>{{ head }}</strong> {{ text }}</div>
{% endfor %}
<h2>What is learned</h2>
<div class="row legend"><span class="masked">masked: read, not learned</span><span class="learned">learned</span>
<span class="learned end">the end of an answer, learned</span></div>
{% for row in rows %}<div class="card"><p class="quiet">{{ row.where }}: {{ row.n }} tokens, {{ row.learned }} learned
{%- if row.cut %}, {{ row.cut }} cut off{% endif %}</p>
<div class="row" dir="auto">{% for bit in row.bits %}<span class="{{ bit.kind }}"
{%- if bit.ids %} title="{{ bit.kind }}, id {{ bit.ids | join(" ") }}"{% endif %}>{{ bit.text }}</span>{% endfor %}</div></div>
{% endfor %}
<h2>Lengths of the {{ n_rows }} rows to learn</h2>
<p class="quiet">the highest bar: {{ most }} rows</p>
<div class="bars" role="img" aria-label="rows by length">{% for n, share in bars %}<div style="height: {{ share }}%"
 title="{{ n }}"></div>{% endfor %}</div>
<div class="axis quiet"><span>{{ shortest }} tokens</span><span>{{ longest }} tokens</span></div>{% endblock %}
"""


def tiles(xray: Xray) -> list[tuple[str, str, str]]:
    """What was counted: (name, the number, what more there is to say)."""
    t, v = xray.train, xray.val
    shortest, median, usual, longest = t.lengths
    cut, nothing = t.cut + v.cut, t.nothing + v.nothing
    ended = "all" if xray.ended == xray.answers else f"{xray.ended:,}"
    return [
        ("rows", f"{t.rows:,}", f"to learn, {v.rows:,} held out"),
        ("tokens", f"{t.tokens:,}", f"of which {t.learned:,} ({t.learned / max(1, t.tokens):.1%}) are learned"),
        ("lengths", f"{median:,}", f"tokens in the median, from {shortest:,} to {longest:,}, 95% up to {usual:,}"),
        ("ends learned", ended, f"of {xray.answers:,} answers"),
        ("cut", f"{cut:,}", f"rows ({cut / max(1, t.rows + v.rows):.1%})"),
        ("nothing to learn", f"{nothing:,}", "rows"),
        ("repeated", f"{t.twice:,}", f"rows; held out and yet learned: {xray.seen:,}"),
        ("contradictory", f"{xray.conflicts:,}", "questions with several answers"),
    ]


def numbers(xray: Xray) -> list[tuple[str, str]]:
    """What was counted, as lines of a terminal."""
    return [(name, f"{value} {more}") for name, value, more in tiles(xray)]


# ---- a row, token by token -----------------------------------------------------------------------------------------


class Bit(NamedTuple):
    """What is shown of a row at a time: a token, or several that make one character; without ids a gap."""

    kind: str
    text: str
    ids: tuple[int, ...]


def bits(row: Row, piece: Piece, ends: Sequence[int]) -> list[Bit]:
    """A row token by token; of a long stretch of one kind its two ends.

    bits(...) -> [("masked", "<|im_start|>", (1,)), ..., ("learned", "yes", (8505,)), ("learned end", "<|im_end|>", (2,))]
    """
    found: list[Bit] = []
    kinds = (["masked", "learned"][learned] for learned in row.learned.tolist())
    for kind, stretch in groupby(zip(kinds, row.ids.tolist(), strict=True), key=lambda pair: pair[0]):
        ids = [i for _, i in stretch]
        left_out = len(ids) - 2 * EDGE
        if left_out <= EDGE:  # not worth a gap
            found += spelled(ids, kind, piece, ends)
            continue
        found += spelled(ids[:EDGE], kind, piece, ends)
        found.append(Bit("gap", f"… {left_out:,} more {kind} …", ()))
        found += spelled(ids[-EDGE:], kind, piece, ends)
    rest = sum(len(bit.ids) for bit in found[MOST_TOKENS:])
    return found[:MOST_TOKENS] + ([Bit("gap", f"… {rest:,} more tokens", ())] if rest else [])


def spelled(ids: Sequence[int], kind: str, piece: Piece, ends: Sequence[int]) -> Iterator[Bit]:
    """Tokens of one kind with their text. Bytes wait for the rest of their character."""
    decoder, held = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for i in ids:
        part = piece(i)
        if isinstance(part, str) and held:
            yield Bit(kind, shown(decoder.decode(b"", final=True)), tuple(held))
            held = []
        held.append(i)
        text = part if isinstance(part, str) else decoder.decode(part)
        if text or not part:
            yield Bit("learned end" if kind == "learned" and i in ends else kind, shown(text), tuple(held))
            held = []
    if held:
        yield Bit(kind, shown(decoder.decode(b"", final=True)), tuple(held))


def shown(text: str) -> str:
    """Text as it stands there: what would hide, turn or overwrite it is spelled out. shown("a\\u202eb") -> "a⟨U+202E⟩b" """
    return printable(HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text).replace("\r", "␍"))


def line(text: str) -> str:
    """The same on one line."""
    return shown(text).replace("\n", "↵")


# ---- where it is shown ---------------------------------------------------------------------------------------------


def row_text(row: Row, piece: Piece, ends: Sequence[int]) -> Text:
    """A row in a terminal's colours."""
    styles = {"masked": "dim", "learned": "bold green", "learned end": "bold green reverse", "gap": "dim italic"}
    return Text.assemble(*((bit.text, styles[bit.kind]) for bit in bits(row, piece, ends)))


def remark_text(remark: Remark) -> Text:
    """A remark in a terminal's colours."""
    return Text(f"{WORDS[remark.severity]} {remark.code}  {line(remark.text)}", style=COLOURS[remark.severity])


def page(title: str, xray: Xray, train: Sequence[Row], piece: Piece, ends: Sequence[int]) -> str:
    """The page."""
    bars = histogram(train)
    most = max(n for _, n in bars)
    rows = [
        {"where": line(row.where), "n": len(row.ids), "learned": int(row.learned.sum()), "cut": row.cut}
        | {"bits": [bit._replace(text=bit.text.replace("\n", "↵\n")) for bit in bits(row, piece, ends)]}
        for row in xray.shown
    ]
    remarks = [(each.severity, f"{WORDS[each.severity]} {each.code}", line(each.text)) for each in xray.remarks]
    return render(
        PAGE,
        title=line(title),
        refused=bool(xray.refuses),
        tiles=tiles(xray),
        remarks=remarks,
        rows=rows,
        n_rows=f"{len(train):,}",
        bars=[(f"from {start} tokens: {n} rows", round(100 * n / max(most, 1), 1)) for start, n in bars],
        most=f"{most:,}",
        shortest=xray.train.lengths[0],
        longest=xray.train.lengths[3],
    )


def figures(xray: Xray) -> dict[str, Any]:
    """What was counted, for a script."""
    found = asdict(xray)
    del found["shown"]
    return found
