"""The shell of every page kobza writes: one file, no network, no script, the reader's light or dark setting, fits a phone.

A page is a Jinja template that fills the blocks `style` (its own rules, after the common ones) and `body` of SHELL. Its content
policy forbids scripts and the network, so that what a model wrote or a hostile file holds stays text.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#30343b"  # svg_text replaces it by the page's own text colour, so it must not be used for anything but ink

SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
:root { --ink: #1f2328; --quiet: #5c6470; --ground: #fbfaf8; --card: #ffffff; --line: #dddad4; --mark: #b4470b;
  --tint: #fdf1e8; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e4df; --quiet: #a3a8b0; --ground: #16181b; --card: #1e2125;
  --line: #363a40; --mark: #ff9d5c; --tint: #33261b; --good: #5fd097; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 0.6rem; }
p { margin: 0.4rem 0; max-width: 44rem; }
.quiet { color: var(--quiet); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.6rem 0.8rem;
  margin: 0.6rem 0; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.6rem; margin: 0; }
.numbers div { background: var(--card); border: 1px solid var(--line); border-radius: 0.5rem; padding: 0.6rem 0.8rem; }
.numbers dt { color: var(--quiet); font-size: 0.85rem; }
.numbers dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0 0; color: var(--ink); }
figure svg { display: block; width: 100%; height: auto; }
.wide { overflow: auto; border: 1px solid var(--line); border-radius: 0.5rem; background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.35rem 0.8rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; }
tr + tr td, tbody tr:first-child td { border-top: 1px solid var(--line); }
code, pre { font: 0.9rem/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; }
pre { margin: 0.3rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
{% block style %}{% endblock %}
</style>
</head>
<body>
<main>
{% block body %}{% endblock %}
</main>
</body>
</html>
"""


def render(page: str, **values: Any) -> str:
    """A page's template, which extends "shell", with its values, `title` among them -> HTML. Values are escaped unless Markup."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    loader = DictLoader({"shell": SHELL, "page": page})
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page").render(values)


def printable(value: Any) -> str:
    """Anything -> text without the control characters that HTML forbids; each becomes the replacement character."""
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))


def write_whole(path: Path, text: str) -> Path:
    """Replace a file whole -> its path. Not checkpoint.py's write_file, which would load torch."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


def write_png(path: str | Path, figure: Figure) -> None:
    """A figure -> a PNG file on a white ground, readable anywhere."""
    figure.savefig(path, format="png", dpi=160, facecolor="white")


def svg_text(figure: Figure) -> str:
    """A figure -> an `<svg>` element for an HTML page: scales with the page, takes its text colour, same every time."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "kobza"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")  # from <svg: a page has its own declarations
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
