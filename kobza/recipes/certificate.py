"""kobza certificate: what an exported folder's certificates say, and whether its files are still those."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from kobza.config import require
from kobza.export.proof.certificate import FILE, Certificate, verify
from kobza.formats.template import read_text


def main(folder: Path, as_json: bool) -> int:
    """Read and verify -> exit code: 0 if all is certified and as it was."""
    require(folder.is_dir(), f"{folder}: no such folder; name one that kobza export wrote")
    paths = sorted(folder.glob(f"*{FILE}"))
    require(bool(paths), f"{folder}: no {FILE} in it; export the model again")
    found = {path.name: Certificate.from_json(read_text(path)) for path in paths}
    changed = {name: verify(certificate, folder) for name, certificate in found.items()}
    good = all(certificate.ok and not changed[name] for name, certificate in found.items())
    if as_json:
        said = {name: {"certified": c.ok, "changed": changed[name]} for name, c in found.items()}
        print(json.dumps({"folder": str(folder), "ok": good, "certificates": said}))
        return 0 if good else 1
    console = Console(highlight=False, soft_wrap=True)
    for name, c in found.items():
        why = c.why_not or ", ".join(c.failed)
        verdict = f"certified: {len(c.checks)} checks held in {c.engine}" if c.ok else f"NOT certified: {why}"
        console.print(escape(f"{c.name} {c.form}, {c.date}: {verdict}"))
        for word in changed[name]:
            console.print(escape(f"  CHANGED: {word}"))
        if c.ok and not changed[name]:
            n = len(c.artifact)
            console.print("  its file is as it was" if n == 1 else f"  its {n} files are as they were")
    return 0 if good else 1
