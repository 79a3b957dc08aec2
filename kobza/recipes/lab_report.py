"""kobza lab report: what runs left -> statistics, verdicts, pages, and one table of many questions. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kobza.lab.debates import summarise
from kobza.lab.page import write_pages
from kobza.lab.report import assemble, design_folders, is_begun, label
from kobza.lab.statistics import engineering


def main(paths: list[Path], summary: Path | None, as_json: bool) -> int:
    """Draw reports again from what is on disk, and tabulate them if asked -> exit code."""
    console = Console(stderr=as_json, highlight=False)
    folders = list(dict.fromkeys(folder for path in paths for folder in design_folders(path)))
    begun = [folder for folder in folders if is_begun(folder)] or folders  # none: `show` says so
    for folder in folders:
        if folder not in begun:
            console.print(f"{folder}: no run is done yet; left out", markup=False, soft_wrap=True)
    code = show(begun, console, as_json)
    if summary:
        contents = [json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in begun]
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(summarise(contents), encoding="utf-8")
        console.print(f"summary   {summary}", markup=False, soft_wrap=True)
    return code


def show(folders: list[Path], console: Console, as_json: bool) -> int:
    """Write the reports of designs and print their verdicts -> exit code."""
    contents = []
    for folder in folders:
        content = assemble(folder)
        page = write_pages(folder, content)
        contents.append(content | {"report": str(page)})
        if not as_json:
            print_verdicts(content, console)
            console.print(f"report    {page}\n", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(contents[0] if len(contents) == 1 else contents))
    return 0


def print_verdicts(content: dict[str, Any], console: Console) -> None:
    """The table of arms and what is found of each."""
    console.print(content["title"], style="bold", markup=False)
    table = Table("arm", "runs", "mean", "seed SD", "parameters", "steps", "FLOPs", "seconds", box=None, pad_edge=False)
    for arm in content["arms"]:
        mean, sd = (f"{arm[key]:.4f}" if arm[key] is not None else "-" for key in ("mean", "sd"))
        costs = [engineering(arm[key]) if arm[key] else "-" for key in ("parameters", "steps", "flops")]
        spent = f"{arm['seconds']:.2f}" if arm["seconds"] is not None else "-"
        table.add_row(arm["label"], str(len(arm["values"])), mean, sd, *costs, spent)
    console.print(table)
    for c in content["comparisons"]:
        console.print(f"{label(c)} against {c['baseline']}: {c['verdict']}", markup=False, soft_wrap=True)
    for line in content["trends"]:
        console.print(f"{line['arm']}, over sizes: {line['verdict']}", markup=False, soft_wrap=True)
    if content["control"]:
        console.print(content["verdict"], markup=False, soft_wrap=True)
    for warning in content["warnings"]:
        console.print(f"note: {warning}", markup=False, soft_wrap=True)
