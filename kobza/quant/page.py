"""A damage report -> one HTML page: what few bits cost overall, and a bar for each weight, a panel a projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kobza.pages.shell import render

HEIGHT, STEP, BAR = 64, 10, 8  # of a panel in its own units: the page stretches it

PAGE = """{% extends "shell" %}
{% block style %}.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0.6rem 1.2rem; }
.panels figure { margin: 0.6rem 0 0; } .panels svg { height: 5rem; border-bottom: 1px solid var(--line); }
.panels figcaption { display: flex; justify-content: space-between; gap: 1rem; font-size: 0.9rem; }
rect { fill: var(--quiet); } rect.wider { fill: var(--mark); } rect:hover { fill: var(--ink); }
.key { color: var(--mark); font-weight: 600; }
td:first-child, th:first-child { text-align: left; }{% endblock %}
{% block body %}<h1>{{ title }}</h1>
<p class="quiet">{{ r.tokens }} tokens of {{ r.text }}; the float model is the measure.</p>
<dl class="numbers">
{% for name, value in tiles %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
<h2>Each weight alone</h2>
<p>The height is what rounding this one weight costs, in nats a token, on one scale; layers from left to right.
{%- if r.kept_wider %} <span class="key">Coloured</span>: kept wider in the end.{% endif %}</p>
<div class="panels">
{% for panel in panels %}<figure><figcaption><span>{{ panel.name }}</span><span class="quiet">at most {{ panel.most }}</span>
</figcaption><svg viewBox="0 0 {{ panel.width }} {{ height }}" preserveAspectRatio="none" role="img"
 aria-label="{{ panel.name }}: at most {{ panel.most }} nats a token">
{% for bar in panel.bars %}<rect x="{{ bar.x }}" y="{{ height - bar.height }}" width="{{ width }}" height="{{ bar.height }}"
{%- if bar.wider %} class="wider"{% endif %}><title>{{ bar.title }}</title></rect>
{% endfor %}</svg></figure>
{% endfor %}</div>
<h2>All weights</h2>
<div class="wide" tabindex="0"><table><thead><tr><th>weight</th><th>type</th><th>KL alone</th><th>bytes</th></tr></thead><tbody>
{% for t in r.tensors %}<tr><td>{{ t.name }}</td><td>{{ t.type }}</td><td>{{ "%.3g" % t.kl }}</td>
<td>{{ "{:,}".format(t.bytes) }}</td></tr>
{% endfor %}</tbody></table></div>{% endblock %}
"""


def damage_page(report: Mapping[str, Any]) -> str:
    """The page of what recipes/quantize.py reports: tensors [{name, type, kl, bytes}], kept_wider, overall, before and after."""
    overall, title = report["overall"], f"{report['model']} in {report['to']}"
    tiles = [
        ("KL, nats a token", f"{overall['kl']:.3g}"),
        ("of 99 tokens in 100 below", f"{overall['kl_99']:.3g}"),
        ("bits per byte", f"{overall['bits_per_byte']:.4f} {overall['bits_per_byte_change']:+.4f}"),
        ("likeliest token changed", f"{overall['flips']:.2%}"),
        ("size", f"{report['bytes_before'] / 1e6:,.1f} MB to {report['bytes_after'] / 1e6:,.1f} MB"),
        ("kept wider", f"{len(report['kept_wider'])} of {len(report['tensors'])}"),
    ]
    return render(PAGE, title=title, r=report, tiles=tiles, panels=panels(report), height=HEIGHT, width=BAR)


def panels(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bars, by projection: weights of blocks side by side, the others in a panel of their own."""
    found: dict[str, list[dict[str, Any]]] = {}
    for tensor in report["tensors"]:
        where = tensor["name"].removesuffix(".weight").split(".")
        found.setdefault(".".join(where[2:]) if where[0] == "blocks" else ".".join(where), []).append(tensor)
    top = max((tensor["kl"] for tensor in report["tensors"]), default=0) or 1.0
    return [
        {
            "name": name,
            "most": f"{max(tensor['kl'] for tensor in tensors):.2g}",
            "width": max(STEP * len(tensors), 4 * STEP),
            "bars": [bar(i, tensor, top, tensor["name"] in report["kept_wider"]) for i, tensor in enumerate(tensors)],
        }
        for name, tensors in found.items()
    ]


def bar(i: int, tensor: Mapping[str, Any], top: float, wider: bool) -> dict[str, Any]:
    """One weight's bar."""
    title = f"{tensor['name']}: {tensor['kl']:.3g} nats a token; kept in {tensor['type']}"
    return {
        "x": STEP * i + 1,
        "height": round(max(0.5, HEIGHT * tensor["kl"] / top), 2),
        "wider": wider,
        "title": title,
    }
