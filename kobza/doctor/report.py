"""An examination as JSON, as lines for a terminal, and as one self-contained HTML page.

Every check is told of: ran, skipped with the reason, or failed with the reason; what was not made is no pass.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kobza.doctor.finding import SEVERITIES, Examination, Finding, Outcome, exit_code
from kobza.pages import shell
from kobza.pages.shell import printable

WORDS = {"error": "ERROR", "warn": "warning", "info": "note"}

PAGE = """{% extends "shell" %}
{% block style %}main { max-width: 62rem; }
.finding { border-left: 0.3rem solid var(--quiet); }
.finding.error { border-left-color: var(--mark); background: var(--tint); }
.finding.warn { border-left-color: var(--mark); }
dl.parts { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; margin: 0.5rem 0 0; }
dl.parts dt { color: var(--quiet); } dl.parts dd { margin: 0; overflow-wrap: anywhere; }
.wide { max-height: 34rem; }
th, td { text-align: left; white-space: normal; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
tr.skipped td, tr.failed td { color: var(--quiet); }{% endblock %}
{% block body %}<h1>{{ title }}</h1>
<dl class="numbers">{% for name, value in numbers %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% for finding in findings %}<div class="card finding {{ finding.severity }}">
<strong>{{ words[finding.severity] }} {{ finding.code }}</strong> <span class="quiet">{{ finding.confidence }}</span>
<code>{{ printable(finding.where) }}</code>
<dl class="parts">{% for name, value in parts(finding) %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></div>
{% else %}<p>Nothing was found by the checks that ran.</p>
{% endfor %}
{% for title, svg in plots.items() %}<h2>{{ title }}</h2>
<figure role="img" aria-label="{{ title }}">{{ svg }}</figure>
{% endfor %}
{% for title, rows in facts.items() %}<h2>{{ title }}</h2>
<div class="wide" tabindex="0"><table><thead><tr>{% for cell in rows[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
<h2>Checks</h2>
<div class="wide" tabindex="0"><table>
<thead><tr><th scope="col">codes</th><th scope="col">check</th><th scope="col">outcome</th><th scope="col">ms</th></tr></thead>
<tbody>{% for o in outcomes %}<tr class="{{ o.status }}"><td>{{ o.codes }}</td><td>{{ o.name }}</td>
<td>{{ o.status }}{% if o.reason %}: {{ printable(o.reason) }}{% endif %}</td>
<td class="number">{{ "%.1f"|format(o.ms) }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="quiet">A skipped check is not a pass. An error is proven by its counter-example; a warning may be mistaken.
<code>kobza doctor explain CODE</code> tells more of each.</p>{% endblock %}
"""


def parts(finding: Finding) -> list[tuple[str, str]]:
    """What a finding says, as (name, text), empty parts left out."""
    rows = [("expected", finding.expected), ("got", finding.got), ("counter-example", finding.counterexample)]
    rows += [("why", finding.why), ("fix", finding.fix), ("source", finding.source)]
    return [(name, printable(text)) for name, text in rows if text]


def summary(outcomes: tuple[Outcome, ...]) -> list[tuple[str, str]]:
    """Counts of checks and findings as (name, text)."""
    checks = [(status, sum(o.status == status for o in outcomes)) for status in ("ran", "skipped", "failed")]
    found = [(WORDS[s], sum(f.severity == s for o in outcomes for f in o.findings)) for s in SEVERITIES]
    plural = [(f"{name.lower()}{'s' * (n != 1)}", str(n)) for name, n in found]
    return [(f"checks {name}", str(n)) for name, n in checks] + plural


def to_json(examinations: list[Examination], suppressed: dict[str, int]) -> dict[str, Any]:
    """The machine-readable twin."""
    outcomes = [outcome for examination in examinations for outcome in examination.outcomes]
    return {
        "exit_code": exit_code(outcomes),
        "suppressed": suppressed,
        "examinations": [
            {
                "area": examination.area,
                "subject": examination.subject,
                "findings": [asdict(finding) for finding in examination.findings],
                "checks": [
                    {"codes": o.codes.split(), "name": o.name, "status": o.status, "reason": o.reason, "ms": o.ms}
                    for o in examination.outcomes
                ],
                "facts": examination.facts,
            }
            for examination in examinations
        ],
    }


def to_html(examinations: list[Examination]) -> str:
    """One page over all the examinations of a subject."""
    from markupsafe import Markup

    outcomes = tuple(outcome for examination in examinations for outcome in examination.outcomes)
    findings = sorted((f for e in examinations for f in e.findings), key=lambda f: SEVERITIES.index(f.severity))
    names = ", ".join(examination.area for examination in examinations)
    plots = {title: Markup(svg) for e in examinations for title, svg in e.plots.items()}  # ours: numbers and names
    facts = {t: [[printable(c) for c in row] for row in rows] for e in examinations for t, rows in e.facts.items()}
    return shell.render(
        PAGE,
        title=printable(f"kobza doctor: {names} of {examinations[0].subject}"),
        numbers=summary(outcomes),
        findings=findings,
        parts=parts,
        printable=printable,
        words=WORDS,
        plots=plots,
        facts={printable(title): rows for title, rows in facts.items()},
        outcomes=outcomes,
    )
