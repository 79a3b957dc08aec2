"""kobza doctor: a subject -> what was checked, what is wrong with it, and the counter-example that proves it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kobza.config import require
from kobza.doctor import report
from kobza.doctor.explain import explain
from kobza.doctor.finding import Examination, Finding, Outcome, examine, exit_code
from kobza.doctor.selftest import AREAS, area_module
from kobza.formats.template import find_template
from kobza.hub.store import find_model
from kobza.pages.shell import printable, write_whole

IGNORE = Path(
    ".kobzadoctor"
)  # in the user's own folder: one inside the subject would let a hostile file silence its finding
COLOURS = {"error": "bold red", "warn": "yellow", "info": "dim", "ran": "green", "skipped": "dim", "failed": "magenta"}


def main(
    area: str, names: list[Any], as_json: bool, html: Path | None, fix: Path | None = None, **settings: Any
) -> int:
    """Examine one area of a subject -> exit code. `names` and `settings` are what the area's open_ takes."""
    return show([check(area, names, settings)], as_json, html, fix, settings.get("plot"))


def guess(path: str, as_json: bool, html: Path | None, fix: Path | None) -> int:
    """Examine whatever the path is, by every area that fits -> exit code."""
    done = [check(area, [path if area == "model" else Path(path)], {}) for area in areas_of(path)]
    return show(done, as_json, html, fix, None)


def areas_of(name: str) -> list[str]:
    """The areas that fit a path or name. areas_of("x.gguf") -> ["gguf", "template"]"""
    path = Path(name)
    if path.is_dir():
        return areas_of_folder(path)
    if path.is_file():
        suffixes = {".gguf": ["gguf"], ".jinja": ["template"], ".csv": ["run"], ".jsonl": ["run"]}
        found = ["template"] if path.name.startswith("Modelfile") else suffixes.get(path.suffix, [])
        require(bool(found), f"{path}: cannot tell what it is; name an area: kobza doctor {'|'.join(AREAS)} {path}")
        return found + ["template"] * (path.suffix == ".gguf" and find_template(path) is not None)
    return ["model"]  # a stored model's name, transformers:DIR or package.module:callable


def areas_of_folder(path: Path) -> list[str]:
    """The areas that fit a folder: a run's, a checkpoint's, a model's."""
    if (path / "metrics.jsonl").exists() or (path / "trainer_state.json").exists():
        return ["run"]
    require(not (path / "adapter_config.json").exists(), f"{path} is an adapter; kobza doctor adapter BASE {path}")
    if (path / "manifest.json").exists():
        return ["model"]
    found = [area for area in ("config", "tokenizer") if (path / f"{area}.json").exists()]
    found += ["template"] * (find_template(path) is not None)
    require(bool(found), f"{path}: neither a model's folder, a run's nor an adapter's; name an area")
    return found


def check(area: str, names: list[Any], settings: dict[str, Any]) -> Examination:
    """Open the subject of an area and make its checks, with a line of progress while they run."""
    module, console = area_module(area), Console(stderr=True)
    if area in ("model", "parity"):  # a pulled model's name is its folder; transformers:DIR and package:callable stay
        names = [n if ":" in n or Path(n).exists() else str(find_model(Path(n))) for n in names]
        from kobza.recipes.tuned import check_whole  # brings torch, which files are looked at without

        for name in names:
            check_whole(Path(name))
    with console.status(f"{area}: opening {names[0]}") as status:
        subject = module.open_(*names, **settings)
        done = examine(module.CHECKS, subject, lambda outcome: status.update(f"{area}: {outcome.name}"))
        facts = optional(module, "facts")(subject)
        plots = optional(module, "plots")(subject)
    return Examination(area, " ".join(str(name) for name in names if name), tuple(done), facts, plots)


def optional(module: Any, name: str) -> Callable[[Any], dict]:
    """A function that not every area has."""
    return getattr(module, name, lambda _: {})


# ---- showing -------------------------------------------------------------------------------------------------------


def show(done: list[Examination], as_json: bool, html: Path | None, fix: Path | None, plot: Path | None) -> int:
    """Print examinations, write the page, the plot and the corrected copy that were asked for -> exit code."""
    done, suppressed = suppress(done)
    written = write_files(done, html, fix, plot)
    if as_json:
        print(json.dumps(report.to_json(done, suppressed) | {"written": written}, ensure_ascii=False))
    else:
        console = Console(highlight=False, markup=False)
        for examination in done:
            print_examination(console, examination)
        for code, n in suppressed.items():
            console.print(f"{code}: {n} suppressed by {IGNORE}")
        for path in written:
            console.print(f"written: {path}")
    return exit_code(outcome for examination in done for outcome in examination.outcomes)


def suppress(done: list[Examination]) -> tuple[list[Examination], dict[str, int]]:
    """Leave out the findings whose codes stand in .kobzadoctor -> (what stays, {code: how many went})."""
    words = IGNORE.read_text(encoding="utf-8") if IGNORE.is_file() else ""
    unwanted = {word.upper() for word in re.sub(r"#.*", "", words).split()}
    for word in unwanted:
        explain(word)  # a mistyped code would silence nothing
    gone: dict[str, int] = {}

    def keep(finding: Finding) -> bool:
        out = finding.code.upper() in unwanted
        gone[finding.code] = gone.get(finding.code, 0) + out
        return not out

    done = [
        replace(e, outcomes=tuple(replace(o, findings=tuple(filter(keep, o.findings))) for o in e.outcomes))
        for e in done
    ]
    return done, {code: n for code, n in gone.items() if n}


def write_files(done: list[Examination], html: Path | None, fix: Path | None, plot: Path | None) -> list[str]:
    """The files asked for -> their names."""
    written = [str(write_whole(html, report.to_html(done)))] if html else []
    if plot:
        svgs = [svg for examination in done for svg in examination.plots.values()]
        require(bool(svgs), f"--plot {plot}: there is nothing to draw, for no comparison could be made")
        places = [plot, *(plot.with_stem(f"{plot.stem}-{n}") for n in range(2, len(svgs) + 1))]
        written += [str(write_whole(place, svg)) for place, svg in zip(places, svgs, strict=True)]
    if fix:
        from kobza.doctor.files.fix import write_fixed

        findings = [finding for examination in done for finding in examination.findings]
        lines = write_fixed(Path(done[0].subject), findings, fix)
        written += lines or [f"nothing into {fix}: no finding has a remedy that could be written mechanically"]
    return written


def print_examination(console: Console, examination: Examination) -> None:
    """Findings first, then facts, then every check with its outcome."""
    counts = ", ".join(f"{n} {name}" for name, n in report.summary(examination.outcomes) if n != "0")
    console.print(f"\nkobza doctor {examination.area} {printable(examination.subject)}: {counts}", style="bold")
    for finding in examination.findings:
        print_finding(console, finding)
    for title, rows in examination.facts.items():
        console.print(grid(rows, title))
    table = Table(box=SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("codes", "check", "outcome"):
        table.add_column(column, no_wrap=column == "codes")
    for outcome in examination.outcomes:
        table.add_row(outcome.codes, outcome.name, told(outcome), style=COLOURS.get(outcome.status))
    console.print(table)


def print_finding(console: Console, finding: Finding) -> None:
    """A finding with all it says."""
    head = f"{report.WORDS[finding.severity]} {finding.code} ({finding.confidence}) {printable(finding.where)}"
    console.print(f"\n{head}", style=COLOURS[finding.severity])
    for name, text in report.parts(finding):
        console.print(f"  {name:<16} {text}")


def told(outcome: Outcome) -> str:
    """An outcome in words. "ran, 2 findings", "skipped: no tokenizer.json" """
    n = len(outcome.findings)
    found = f", {n} finding{'s' * (n != 1)}" if n else ""
    return f"{outcome.status}{found}" + (f": {printable(outcome.reason)}" if outcome.reason else "")


def grid(rows: list[list[str]], title: str) -> Table:
    """Rows of cells, the first the header, as a table."""
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for cell in rows[0]:
        table.add_column(cell)
    for row in rows[1:]:
        table.add_row(*map(printable, row))
    return table
