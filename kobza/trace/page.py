"""A Trace -> one self-contained HTML page: attention maps a head, logit lens, the next token before and after temperature."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kobza.pages import shell
from kobza.pages.shell import printable
from kobza.trace.record import Trace

BARS = 20  # likeliest next tokens shown
MAP_PIXELS = 256  # at least, of an attention map's side: sharp cells, whatever scales it

PAGE = """{% extends "shell" %}
{% block style %}main { max-width: 74rem; }
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.7rem; margin: 0.6rem 0 1rem; }
.heads figure { margin: 0; max-width: 22rem; } .heads figcaption { font-size: 0.8rem; color: var(--quiet); line-height: 1.3; }
.heads img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); border-radius: 0.3rem; }
.heads code { font-size: 0.78rem; }
th, td { text-align: left; padding: 0.25rem 0.5rem; }
td.lens { background: color-mix(in srgb, var(--good) calc(var(--p) * 60%), transparent); }
td.lens small { color: var(--quiet); display: block; }
th[scope=row] { position: sticky; left: 0; background: var(--card); }
th.place { font-weight: 400; } th.place small { color: var(--quiet); display: block; }
.bar { height: 0.75rem; border-radius: 0.2rem; background: var(--quiet);
  width: calc(var(--p) * min(18rem, 36vw)); min-width: 1px; }
.bar.after { background: var(--mark); margin-top: 0.15rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.tokens { line-height: 2; } .tokens code { background: var(--card); border: 1px solid var(--line); border-radius: 0.25rem;
  padding: 0.1rem 0.25rem; white-space: pre; }{% endblock %}
{% block body %}<h1>{{ title }}</h1>
<p class="tokens">{% for token in tokens %}<code>{{ token }}</code> {% endfor %}</p>
<p class="quiet">{{ tokens | length }} tokens.{% if cut %}
The first {{ cut }} are left out of the lens; the maps show all.{% endif %}</p>

<h2>What comes next</h2>
<p class="quiet">The likeliest tokens, by the model's own probabilities (grey) and after temperature {{ temperature }}
(orange). Uncertainty: {{ before }} nats before, {{ after }} after: as unsure as between {{ choices_before }} and
{{ choices_after }} equally likely tokens.</p>
<div class="wide"><table><tbody>{% for row in bars %}<tr><td><code>{{ row.token }}</code></td>
<td class="number">{{ row.before }}</td><td class="number">{{ row.after }}</td>
<td><div class="bar" style="--p: {{ row.p }}"></div><div class="bar after" style="--p: {{ row.q }}"></div></td></tr>
{% endfor %}</tbody></table></div>

<h2>Logit lens</h2>
<p class="quiet">What the head would say if the network ended after a layer (nostalgebraist 2020): a row a layer, from the
embedding up; a column a token of the text; in each cell the likeliest next token and its probability. The last row is the
model's answer.</p>
<div class="wide" tabindex="0"><table><thead><tr><th scope="col">layer</th>{% for token in shown %}
<th scope="col" class="place"><small>after</small><code>{{ token }}</code></th>{% endfor %}</tr></thead>
<tbody>{% for row in lens %}<tr><th scope="row">{{ row.name }}</th>{% for cell in row.cells %}
<td class="lens" style="--p: {{ cell.p }}"><code>{{ cell.token }}</code><small>{{ cell.share }}</small></td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>

<h2>Attention</h2>
<p class="quiet">Where each head looks: a row a token, a column the token it looks at, darker is more. Under each map: how far
back the head looks on average, and the strongest look at another token than the first (the first takes what a head has no
use for).</p>
{% for layer in layers %}<details{% if loop.first or loop.last %} open{% endif %}><summary>{{ layer.name }}</summary>
<div class="heads">{% for head in layer.heads %}<figure><img alt="{{ head.words }}" src="{{ head.image }}">
<figcaption>head {{ loop.index0 }}: {{ head.words }}</figcaption></figure>{% endfor %}</div></details>
{% endfor %}{% endblock %}
"""


def render(trace: Trace, tokens: list[str], vocabulary: Any, temperature: float, title: str, most: int) -> str:
    """A trace of `tokens` -> the page. vocabulary(id) -> text of a token; the lens shows the last `most` tokens."""
    cut = max(0, len(tokens) - most)
    p, q = distributions(trace.logits, temperature)
    top = torch.maximum(p, q).topk(min(BARS, len(p))).indices.tolist()
    top = sorted((i for i in top if max(p[i], q[i]) >= 0.0005), key=lambda i: -float(p[i]))
    bars = [
        {"token": printable(vocabulary(i)), "before": f"{p[i]:.1%}", "after": f"{q[i]:.1%}"}
        | {"p": f"{float(p[i]):.4f}", "q": f"{float(q[i]):.4f}"}
        for i in top
    ]
    entropies = [entropy(x) for x in (p, q)]
    return shell.render(
        PAGE,
        title=printable(title),
        tokens=[printable(token) for token in tokens],
        shown=[printable(token) for token in tokens[cut:]],
        cut=cut,
        temperature=f"{temperature:g}",
        before=f"{entropies[0]:.2f}",
        after=f"{entropies[1]:.2f}",
        choices_before=f"{np.exp(entropies[0]):.1f}",
        choices_after=f"{np.exp(entropies[1]):.1f}",
        bars=bars,
        lens=[{"name": name, "cells": cells(logits[cut:], vocabulary)} for name, logits in trace.lens.items()],
        layers=[{"name": name, "heads": heads(w, tokens)} for name, w in trace.attention.items()],
    )


def distributions(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The next token's probabilities (V,) as the model has them and after temperature; 0 is the likeliest alone."""
    p = logits.softmax(-1)
    if temperature == 0:
        return p, torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    return p, (logits / temperature).softmax(-1)


def entropy(p: Tensor) -> float:
    """-sum p ln p, in nats. entropy([0.5, 0.5]) -> 0.69"""
    return float(-(p * p.clamp_min(1e-30).log()).sum()) + 0.0  # no -0


def cells(logits: Tensor, vocabulary: Any) -> list[dict[str, str]]:
    """logits (T, V) -> for each place the likeliest token and its probability."""
    best = logits.softmax(-1).max(-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"token": printable(vocabulary(i)), "share": f"{p:.0%}", "p": f"{p:.3f}"} for i, p in pairs]


def heads(weights: Tensor, tokens: list[str]) -> list[dict[str, str]]:
    """weights (H, T, T) -> for each head its map and a few words."""
    return [{"image": image(w), "words": words(w, tokens)} for w in weights.float().numpy()]


def words(w: np.ndarray, tokens: list[str]) -> str:
    """What a head does with (T, T) weights: "2.4 back; 'the' at 'cat' 83%"."""
    T = len(w)
    back = np.arange(T)[:, None] - np.arange(T)
    mean = float((w * back).sum(-1)[1:].mean()) if T > 1 else 0.0
    others = np.where((back > 0) & (np.arange(T) > 0), w, 0.0)
    i, j = np.unravel_index(int(others.argmax()), others.shape)
    strongest = f"; {tokens[i]} at {tokens[j]} {others[i, j]:.0%}" if others[i, j] > 0 else ""
    return printable(f"{mean:.1f} back{strongest}")


def image(w: np.ndarray) -> str:
    """A map (T, T) of weights as a PNG in a data URL, square cells; the root makes small weights visible."""
    from matplotlib import colormaps
    from PIL import Image

    coloured = (colormaps["Blues"](np.sqrt(w)) * 255).astype(np.uint8)[..., :3]
    size = len(w) * max(1, -(-MAP_PIXELS // len(w)))
    buffer = io.BytesIO()
    Image.fromarray(coloured).resize((size, size), Image.Resampling.NEAREST).quantize(64).save(
        buffer, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
