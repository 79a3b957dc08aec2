"""The codes the doctor knows, out of codes/*.toml: what each looks like, how it is seen, why it matters, who met it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kobza.config import nearest, require

FOLDER = Path(__file__).parent / "codes"


@dataclass(frozen=True)
class Code:
    """One kind of bug. `severity` is the worst it is reported with; `area` the file that tells of it."""

    code: str
    area: str
    title: str
    severity: str
    looks: str
    detect: str
    why: str
    fix: str
    sources: tuple[str, ...] = ()


@cache
def codes() -> dict[str, Code]:
    """All codes by name, in the order of areas and files."""
    found: dict[str, Code] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        for name, row in tomllib.loads(path.read_text(encoding="utf-8")).items():
            assert name not in found, f"{name} stands in {found[name].area}.toml and in {path.name}"
            found[name] = Code(name, path.stem, **row | {"sources": tuple(row.get("sources", ()))})
    return found


def explain(name: str) -> Code:
    """The code of that name, however it is spelled. explain("g9") -> Code("G9", ...)"""
    known = {code.upper(): row for code, row in codes().items()}
    require(name.upper() in known, f"no code {name!r}{nearest(name.upper(), list(known))}")
    return known[name.upper()]
