"""Report content -> report.html (self-contained), report.md, report.json and the pictures, into the design's folder.

The page's shell is pages/shell.py's. What it says is report.py's content, nothing is computed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kobza.lab.picture import curves_figure, differences_figure, trend_figure
from kobza.lab.report import Content, baselines, label
from kobza.lab.statistics import engineering
from kobza.pages import shell
from kobza.pages.shell import svg_text, write_png, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = """{% extends "shell" %}
{% block style %}main { max-width: 66rem; }
h1 { margin-bottom: 0.3rem; }
p { max-width: 48rem; }
.quiet { font-size: 0.92rem; }
.card { border-left: 0.3rem solid var(--quiet); padding: 0.35rem 0.9rem; margin: 0.4rem 0; }
.card.helps { border-left-color: var(--good); }
.card.hurts, .card.note { border-left-color: var(--mark); }
.card.note { background: var(--tint); }
figure { margin: 0.8rem 0 0; max-width: 54rem; }
table { font-size: 0.9rem; }
th, td { padding: 0.35rem 0.55rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
td small { color: var(--quiet); }
code { overflow-wrap: anywhere; }{% endblock %}
{% block body %}<h1>{{ c.title }}</h1>
<p class="quiet">{{ setting }}</p>
{% for item in verdicts %}<div class="card {{ item.kind }}"><strong>{{ item.name }}</strong>
{%- if item.against %} <span class="quiet">against {{ item.against }}</span>{% endif %}<br>{{ item.words }}</div>
{% endfor %}
{% for warning in c.warnings %}<div class="card note">{{ warning }}</div>
{% endfor %}
{% for picture in pictures %}<h2>{{ picture.title }}</h2>
<figure role="img" aria-label="{{ picture.title }}">{{ picture.svg }}</figure>
<p class="quiet">{{ picture.words }}</p>
{% endfor %}
{% for table in tables %}<h2>{{ table.title }}</h2>
<div class="wide" tabindex="0"><table>
<thead><tr>{% for name in table.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
<p class="quiet">{{ table.words }}</p>
{% endfor %}
<h2>Settings</h2>
{% for arm in c.arms %}<details><summary>{{ arm.label }}</summary><p><code>{{ settings(arm) }}</code></p></details>
{% endfor %}
<p class="quiet">{{ provenance }}</p>{% endblock %}
"""

MARKDOWN = """# {{ c.title }}

{{ setting }}

{% for item in verdicts %}- **{{ item.name }}**{% if item.against %} against {{ item.against }}{% endif %}: {{ item.words }}
{% endfor %}
{% for warning in c.warnings %}> {{ warning }}
>
{% endfor %}
{% for picture in pictures %}![{{ picture.title }}]({{ picture.file }})

{% endfor %}
{% for table in tables %}## {{ table.title }}

| {{ table.columns | join(" | ") }} |
|{% for _ in table.columns %}---|{% endfor %}

{% for row in table.rows %}| {{ row | join(" | ") }} |
{% endfor %}

{{ table.words }}

{% endfor %}
{{ provenance }}
"""

DIFFERENCE_WORDS = (
    "Diamond: mean difference over paired seeds; bar: its 95% interval (not corrected for several comparisons); dots: the single "
    "pairs; grey band: one seed-to-seed SD of the baseline. Coloured: significant after Holm's correction."
)
CURVE_WORDS = (
    "Mean over seeds; the band is one seed-to-seed SD. The ends have the room, so a high beginning may be cut off."
)
COMPARISON_WORDS = (
    "p: paired t-test; corrected: Holm, over all comparisons here. dz: mean difference in SDs of the differences; against noise: "
    "in seed-to-seed SDs of the baseline. Detectable: what so many pairs find with 80% power. Wilcoxon's signed-rank test is a "
    "check, for six pairs or more."
)


def write_pages(folder: Path, content: Content) -> Path:
    """Write everything a report is -> the path of report.html."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    figures = pictures(content)
    for name, _, _, figure in figures:
        write_png(folder / f"{name}.png", figure)
    shown = {
        "c": content,
        "setting": setting(content),
        "verdicts": verdicts(content),
        "tables": tables(content),
        "provenance": provenance(content),
        "settings": settings,
    }
    drawn = [
        {"title": title, "words": words, "file": f"{name}.png", "svg": Markup(svg_text(figure))}
        for name, title, words, figure in figures
    ]
    # trim_blocks for markdown alone: there a newline means something
    text = Environment(autoescape=False, undefined=StrictUndefined, trim_blocks=True).from_string(MARKDOWN)
    write_whole(folder / "report.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_whole(folder / "report.md", text.render(shown, pictures=drawn))
    return write_whole(folder / "report.html", shell.render(PAGE, title=content["title"], pictures=drawn, **shown))


def pictures(content: Content) -> list[tuple[str, str, str, Figure]]:
    """(file, title, words, figure) of every picture that the content gives."""
    found = [("differences", "Differences", DIFFERENCE_WORDS, differences_figure(content))]
    trends = "; ".join(f"{line['arm']}: {line['verdict']}" for line in content["trends"])
    found.append(("trend", "Over sizes", trends, trend_figure(content)))
    sizes = list(dict.fromkeys(arm["size"] for arm in content["arms"]))
    for i, size in enumerate(sizes):
        title = f"Learning curves, {size}" if size else "Learning curves"
        found.append((f"curves-{i + 1}" if size else "curves", title, CURVE_WORDS, curves_figure(content, size)))
    return [(name, title, words, figure) for name, title, words, figure in found if figure is not None]


# ---- words ---------------------------------------------------------------------------------------------------------


def setting(content: Content) -> str:
    """What was compared on what, in a line."""
    text, bytes_ = " ".join(content["text"]["names"]), content["text"]["bytes"]
    least, most = (f([arm["parameters"] or 0 for arm in content["arms"]]) for f in (min, max))
    size = engineering(least) if least == most else f"{engineering(least)} to {engineering(most)}"
    measure = "bits per byte" if content["measure"] == "val_bpb" else "nats per token"
    return (
        f"Base {content['base']}, {size} parameters, on {text} ({engineering(bytes_)} bytes); {content['runs_done']} runs at "
        f"{content['budget']['words']}; measured: {content['at']} held-out loss in {measure}, on the last "
        f"{content['eval_bytes']:,} bytes."
    )


def verdicts(content: Content) -> list[dict[str, str]]:
    """The cards at the top: a comparison or trend each."""
    cards = [
        {"name": label(c), "against": c["baseline"], "words": c["verdict"], "kind": kind(c)}
        for c in content["comparisons"]
    ]
    cards += [
        {"name": f"{line['arm']}, over sizes", "against": "", "words": line["verdict"], "kind": ""}
        for line in content["trends"]
    ]
    if content["control"]:
        cards.append({"name": "A/A control", "against": "", "words": content["verdict"], "kind": ""})
    return cards


def kind(c: Content) -> str:
    """Which colour a comparison's card has."""
    return ("helps" if c["difference"] < 0 else "hurts") if c["detected"] else ""


def provenance(content: Content) -> str:
    """Where and with what the runs were made."""
    machine = content["machine"]
    jobs = f"{', '.join(map(str, machine['jobs']))} at a time, {', '.join(map(str, machine['threads']))} thread(s) each"
    versions = f"kobza {', '.join(machine['kobza'])}, torch {', '.join(machine['torch'])}"
    where = f"{', '.join(machine['device'])}; {', '.join(machine['precision'])}"
    return f"Made by kobza lab: {where}; runs {jobs}; {versions}; text sha256 {content['text']['sha256'][:16]}."


def settings(arm: Content) -> str:
    """An arm's whole configuration in a line."""
    return json.dumps(arm["settings"])


# ---- tables --------------------------------------------------------------------------------------------------------


def tables(content: Content) -> list[dict[str, Any]]:
    """The tables of a report, cells as text."""
    found = [arm_table(content)]
    return [comparison_table(content), *found] if content["comparisons"] else found


def arm_table(content: Content) -> dict[str, Any]:
    """What each arm reached and spent, with the mismatch against its baseline."""
    base = baselines(content["arms"])
    columns = ["arm", "runs", f"mean, {content['unit']}", "seed SD", *"parameters steps tokens FLOPs seconds".split()]
    rows = []
    for arm in content["arms"]:
        runs = f"{len(arm['values'])}" + f" ({arm['diverged']} diverged)" * bool(arm["diverged"])
        row = [arm["label"], runs, number(arm["mean"], 4), number(arm["sd"], 4)]
        row += [
            beside(arm, base.get(arm["size"], arm), key)
            for key in ("parameters", "steps", "tokens", "flops", "seconds")
        ]
        rows.append(row)
    words = f"Matched: {content['budget']['words']}. In brackets: what an arm has or spent beyond its baseline."
    return {"title": "Arms and what they spent", "columns": columns, "rows": rows, "words": words}


def beside(arm: Content, base: Content, key: str) -> str:
    """A cost with its mismatch. "1.2M (+3%)" """
    if arm[key] is None:
        return "-"
    value = f"{arm[key]:.2f}" if key == "seconds" else engineering(arm[key])
    share = arm[key] / base[key] - 1 if base[key] else 0.0
    return value if arm is base or abs(share) < 0.0005 else f"{value} ({share:+.1%})"


def comparison_table(content: Content) -> dict[str, Any]:
    """The statistics of every comparison."""
    columns = "arm pairs difference 95% p corrected Wilcoxon dz noise detectable seeds".split()
    columns[3], columns[8], columns[10] = "95% interval", "against noise", "seeds needed"
    rows = []
    for c in content["comparisons"]:
        interval = "-" if c["low"] is None else f"{c['low']:+.4f} to {c['high']:+.4f}"
        noise = c["difference"] / c["noise"] if c["noise"] and c["difference"] is not None else None
        seeds = "" if c["detected"] else f"{c['seeds_needed']:,}" if c["seeds_needed"] else "-"
        probabilities = [probability(c[key]) for key in ("p", "p_corrected", "wilcoxon")]
        row = [label(c), str(c["n"]), number(c["difference"], 4, "+"), interval, *probabilities]
        rows.append([*row, number(c["dz"], 2, "+"), number(noise, 1, "+"), number(c["detectable"], 4), seeds])
    if all(row[6] == "-" for row in rows):  # too few pairs for Wilcoxon
        columns, rows = columns[:6] + columns[7:], [row[:6] + row[7:] for row in rows]
    return {"title": "Comparisons", "columns": columns, "rows": rows, "words": COMPARISON_WORDS}


def number(value: float | None, digits: int, sign: str = "") -> str:
    """A number as text; a dash where there is none."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def probability(p: float | None) -> str:
    """A p-value as text. probability(0.00001) -> "<0.0001" """
    return "-" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}"
