"""What a run left -> one self-contained `report.html`: picture, remarks, what the numbers mean, samples, config.

The shell is pages/shell.py's: no network, no script, so that a sample, which is whatever the model wrote, stays text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from kobza.config import flatten
from kobza.pages import shell
from kobza.pages.shell import printable, svg_text
from kobza.report.coach import Facts, meaning, remarks
from kobza.report.landmarks import Landmarks
from kobza.report.metrics import Record, is_finite, series
from kobza.report.picture import loss_figure

PAGE = """{% extends "shell" %}
{% macro card(sample) %}<div class="card"><span class="quiet">step {{ sample.step }}</span>
<pre dir="auto">
{{ sample.text }}</pre></div>{% endmacro %}
{% block style %}.remark { border-left: 0.3rem solid var(--quiet); }
.remark.warning { border-left-color: var(--mark); background: var(--tint); }
.remark.healthy { border-left-color: var(--good); }
.wide { max-height: 28rem; }
th { position: sticky; top: 0; background: var(--card); box-shadow: inset 0 -1px var(--line); }
tr.best td { color: var(--good); font-weight: 600; }
table.config th, table.config td { text-align: left; position: static; box-shadow: none; white-space: normal;
  overflow-wrap: anywhere; }
table.config tr + tr th { border-top: 1px solid var(--line); }
table.config th { font-weight: 400; color: var(--quiet); width: 45%; }
code.flag { white-space: nowrap; }{% endblock %}
{% block body %}<h1>{{ title }}</h1>
<dl class="numbers">
{% for name, value in numbers %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
<figure role="img" aria-label="{{ picture_label }}">{{ picture }}</figure>

<h2>Coach</h2>
{% for remark in remarks %}<div class="card remark {{ remark.severity }}">
<p><strong>{{ "Warning" if remark.severity == "warning" else "Note" }}, step {{ "{:,}".format(remark.step) }}.</strong>
{{ remark.text }}</p>
<p>{{ flags(remark.remedy) }}</p>
</div>
{% else %}<div class="card remark healthy"><p>Nothing to remark: no rule of the coach sees trouble.</p></div>
{% endfor %}
<h2>What the numbers mean</h2>
<div class="card">
{% if meaning %}<p><strong>{{ meaning }}</strong></p>
{% endif %}<p>The loss is how surprised the model is by the next token, in nats: ln of the number of equally likely
tokens it would be as unsure between. Lower is better. Validation loss is on text it was not trained on; it is the one
to judge by.</p>
<dl class="numbers">
{% for name, value in landmarks %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
</div>

{% if evaluations %}<h2>Evaluations</h2>
<div class="wide" tabindex="0"><table>
<thead><tr>{% for name in columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in evaluations %}<tr{% if row.best %} class="best"{% endif %}>
{%- for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
<p class="quiet">The lowest validation loss is in bold.</p>
{% endif %}
{% if samples %}<h2>Samples</h2>
{% if samples[:-1] %}<details><summary>{{ samples[:-1] | length }} earlier</summary>
{% for sample in samples[:-1] %}{{ card(sample) }}
{% endfor %}</details>
{% endif %}{{ card(samples[-1]) }}
{% endif %}
{% if config %}<h2>Config</h2>
<div class="wide" tabindex="0"><table class="config">
{% for name, value in config %}<tr><th scope="row"><code>{{ name }}</code></th><td><code>{{ value }}</code></td></tr>
{% endfor %}</table></div>
{% endif %}
{% endblock %}
"""  # a sample's <pre> begins with a newline of its own: HTML drops the first one, and the sample's must stay

COLUMNS = {  # heading: (key of the record, format)
    "step": ("step", "{:,}"),
    "train loss": ("train_loss", "{:.4f}"),
    "validation loss": ("val_loss", "{:.4f}"),
    "bits per byte": ("val_bpb", "{:.4f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "learning rate": ("lr", "{:.3g}"),
    "minutes": ("minutes", "{:.1f}"),
}


def write_report(
    run_dir: str | Path,
    records: list[Record],
    landmarks: Landmarks,
    facts: Facts,
    samples: list[dict[str, Any]],
    title: str,
    config: dict[str, Any],
) -> Path:
    """What a run left -> the path of `report.html`, written into run_dir, whole or not at all.

    samples are dicts with `step` and `text`; config is a dict, nested ones are shown as `train.lr`.
    """
    path = Path(run_dir) / "report.html"
    return shell.write_whole(path, render(records, landmarks, facts, samples, title, config))


def render(
    records: list[Record],
    landmarks: Landmarks,
    facts: Facts,
    samples: list[dict[str, Any]],
    title: str,
    config: dict[str, Any],
) -> str:
    """What a run left -> the page as HTML text."""
    best = best_loss(records)
    return shell.render(
        PAGE,
        title=printable(title),
        numbers=numbers(records, facts),
        picture=Markup(svg_text(loss_figure(records, landmarks))),  # ours, and it holds numbers only
        picture_label=f"Losses over the steps. {loss_words(records)}",
        flags=flags,
        remarks=remarks(records, landmarks, facts),
        meaning=None if best is None else meaning(best, landmarks),
        landmarks=landmark_numbers(landmarks),
        columns=list(COLUMNS),
        evaluations=evaluation_rows(records),
        samples=[{"step": f"{s['step']:,}", "text": printable(s["text"])} for s in samples],
        config=[(printable(name), printable(value)) for name, value in flatten(config).items()],
    )


# ---- the parts of the page ----


def best_loss(records: list[Record]) -> float | None:
    """Records -> the lowest validation loss, else the last train loss, else None."""
    _, val = series(records, "val_loss")
    _, train = series(records, "train_loss")
    if len(val):
        return float(val.min())
    return float(train[-1]) if len(train) else None


def loss_words(records: list[Record]) -> str:
    """Records -> the picture in words, for who cannot see it."""
    _, val = series(records, "val_loss")
    if len(val) == 0:
        return "No evaluation yet."
    return f"Validation loss goes from {val[0]:.2f} to {val[-1]:.2f}; its lowest is {val.min():.2f}."


def numbers(records: list[Record], facts: Facts) -> list[tuple[str, str]]:
    """Records, Facts -> (name, value) pairs for the head of the page."""
    last = records[-1] if records else {}
    _, val = series(records, "val_loss")
    _, bpb = series(records, "val_bpb")
    _, tokens = series(records, "tokens")
    _, speed = series(records, "tokens_per_second")
    shown = [
        ("validation loss", f"{val.min():.3f}" if len(val) else None),
        ("bits per byte", f"{bpb.min():.3f}" if len(bpb) else None),
        ("steps", f"{last.get('step', 0):,} of {facts.steps:,}"),
        ("parameters", short(facts.n_params)),
        ("tokens in the text", short(facts.train_tokens)),
        ("epochs", f"{tokens[-1] / max(facts.train_tokens, 1):.1f}" if len(tokens) else None),
        ("tokens a second", short(float(np.median(speed))) if len(speed) else None),
        ("time", duration(last["seconds"]) if is_finite(last.get("seconds")) else None),
    ]
    return [(name, value) for name, value in shown if value is not None]


def landmark_numbers(landmarks: Landmarks) -> list[tuple[str, str]]:
    """Landmarks -> (name, value) pairs, in nats per token."""
    shown = [
        ("knows nothing, ln V", f"{landmarks.uniform:.2f}"),
        ("token frequencies", f"{landmarks.unigram:.2f}"),
        ("token pairs", f"{landmarks.bigram:.2f}"),
    ]
    if landmarks.mean_token_bytes is not None:
        shown.append(("bytes a token", f"{landmarks.mean_token_bytes:.2f}"))
    return shown


def evaluation_rows(records: list[Record]) -> list[dict[str, Any]]:
    """Records -> for each evaluation its cells as text and whether it is the best."""
    evaluated = [r for r in records if is_finite(r.get("val_loss"))]
    best = min(evaluated, key=lambda r: r["val_loss"], default=None)
    return [{"cells": cells(record), "best": record is best} for record in evaluated]


def cells(record: Record) -> list[str]:
    """A record -> its cells as text, empty where it has no number."""
    if is_finite(record.get("seconds")):
        record = {**record, "minutes": record["seconds"] / 60}
    return [form.format(record[key]) if is_finite(record.get(key)) else "" for key, form in COLUMNS.values()]


def flags(text: str) -> Markup:
    """Text -> HTML in which `--train.lr` and its like are code, not broken at the dashes; the rest is escaped."""
    return Markup(re.sub(r"(?<!\w)--[a-z][\w.]*(=[\w.-]*\w)?", r'<code class="flag">\g<0></code>', str(escape(text))))


def short(count: float) -> str:
    """A count -> few digits. `short(1234567) -> "1.23M"`"""
    count = float(f"{count:.3g}")  # rounded first, or 999,999 would be 1e+03k
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """Seconds -> text in the largest fitting unit. `duration(90) -> "1.5 min"`"""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
