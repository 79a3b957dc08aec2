"""Certificates -> one page a person can read: the verdict, what was checked with its limit, against what, and the hashes."""

from __future__ import annotations

from collections.abc import Sequence

from kobza.export.proof.certificate import Certificate
from kobza.export.proof.checks import Check
from kobza.pages import shell
from kobza.pages.shell import printable

PAGE = """{% extends "shell" %}
{% block style %}th, td { text-align: left; vertical-align: top; white-space: normal; }
td.number { text-align: right; white-space: nowrap; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--mark); }
td small, .worst { display: block; color: var(--quiet); overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; white-space: pre-wrap; }
details { margin: 0.6rem 0; }
@media (max-width: 40rem) { .checks thead { display: none; } .checks tr { display: block; padding: 0.5rem 0; }
  .checks tr + tr { border-top: 1px solid var(--line); } .checks td, tr + tr td, tbody tr:first-child td { border: 0; }
  .checks td { display: block; text-align: left; padding: 0.1rem 0.8rem; } td small.unit { display: inline; }
  .checks td[data-is]::before { content: attr(data-is) " "; color: var(--quiet); } }{% endblock %}
{% block body %}<h1>{{ title }}</h1>
{% if many %}<div class="wide"><table><thead><tr><th scope="col">artifact</th><th scope="col">verdict</th>
<th scope="col">proven against</th><th scope="col">divergence</th></tr></thead>
<tbody>{% for c in certificates %}<tr><td><a href="#c{{ loop.index }}">{{ c.form }}</a></td>
<td class="verdict {{ c.colour }}">{{ c.verdict }}</td><td>{{ c.engine }}</td><td>{{ c.divergence }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
{% for c in certificates %}
<section id="c{{ loop.index }}">{% if many %}<h2>{{ c.form }}</h2>{% endif %}
<p class="verdict {{ c.colour }}">{{ c.headline }}</p>
<p>{{ c.against }}</p>
{% if c.checks %}<div class="wide checks"><table><thead><tr><th scope="col"></th><th scope="col">what was checked</th>
<th scope="col">measured</th><th scope="col">limit</th></tr></thead>
<tbody>{% for check in c.checks %}<tr>
<td class="verdict {{ 'good' if check.ok else 'bad' }}">{{ 'holds' if check.ok else 'fails' }}</td>
<td>{{ check.what }}{% if check.worst %}<small>{{ check.worst }}</small>{% endif %}
{% if check.note %}<small>{{ check.note }}</small>{% endif %}</td>
<td class="number" data-is="measured">{{ check.measured }} <small class="unit">{{ check.unit }}</small></td>
<td class="number" data-is="limit">{{ check.limit }}</td></tr>
{% endfor %}</tbody></table></div>{% endif %}
<details><summary>Files, hashes, versions</summary>
<p>{% for name, sha in c.source %}The weights that were exported: {{ name }} <code>{{ sha }}</code>{% endfor %}</p>
{% for name, sha in c.artifact %}<p>{{ name }}<br><code>{{ sha }}</code></p>{% endfor %}
<p class="quiet">{{ c.versions }}. {{ c.machine }}. {{ c.date }}, {{ c.seconds }} s. Texts drawn with seed {{ c.seed }}; held-out
text: {{ c.held_out }}.</p></details></section>
{% endfor %}
<p class="quiet">What the limits are: an artifact's weights may lie as far from the source's as the steps of their format make
them; its probabilities may differ from those of the same weights in kobza by what the engine's own rounding does, measured by
rounding the same way in kobza; and its divergence from the model that was trained may be what random rounding of the same size
costs.</p>{% endblock %}
"""


def certificate_page(certificates: Certificate | Sequence[Certificate]) -> str:
    """The HTML page of one certificate or several of one model."""
    several = [certificates] if isinstance(certificates, Certificate) else list(certificates)
    title = f"{several[0].name}: {several[0].form}" if len(several) == 1 else f"{several[0].name}: certificates"
    shown = [_shown(certificate) for certificate in several]
    return shell.render(PAGE, title=printable(title), certificates=shown, many=len(shown) > 1)


def _shown(c: Certificate) -> dict[str, object]:
    """A certificate in words."""
    n, bad = len(c.checks), sum(not check.ok for check in c.checks)
    if c.why_not:
        headline = f"Not certified: {c.why_not}"
    elif c.ok:
        headline = f"Certified: all {n} checks hold."
    else:
        headline = f"Not certified: {bad} of {n} checks fail."
    other = f"Run by {c.engine}, another program than kobza, and held against the model that was trained."
    own = f"Read back by {c.engine or 'kobza'}: a weaker proof than another engine's."
    kl = [check.measured for check in c.checks if check.name == "divergence"]
    return {
        "form": printable(c.form),
        "headline": printable(headline),
        "verdict": "certified" if c.ok else "not certified",
        "colour": "good" if c.ok else "bad",
        "engine": printable(c.engine or "nothing"),
        "against": printable("" if c.why_not else other if c.independent else own),
        "divergence": f"{max(kl):.2g} nats a token" if kl else "",
        "checks": [_check(check) for check in sorted(c.checks, key=lambda check: check.ok)],
        "source": [(printable(name), sha) for name, sha in c.source.items()],
        "artifact": [(printable(name), sha) for name, sha in c.artifact.items()],
        "versions": ", ".join(f"{name} {version}" for name, version in c.versions.items()),
        "machine": c.machine,
        "date": c.date,
        "seconds": f"{c.seconds:.1f}",
        "seed": c.seed,
        "held_out": c.held_out,
    }


def _check(check: Check) -> dict[str, object]:
    words = {name: printable(getattr(check, name)) for name in ("what", "unit", "worst", "note")}
    return words | {"ok": check.ok, "measured": f"{check.measured:.3g}", "limit": f"{check.limit:.3g}"}
