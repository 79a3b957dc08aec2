"""What a certificate.json says, for a page: read from the file itself, which anybody may have sent, and believed as far as its
checks.

The file's form is kobza.export.proof.certificate's; whether the exported files are still those is `kobza certificate`'s to say.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kobza.studio.runs_files import read_some

MOST_IN_A_FOLDER = 100
MOST_BYTES = 4 << 20
MOST_CHECKS = 1000


@dataclass(frozen=True)
class Certificate:
    """What a certificate.json says, as text. `problem`: why it cannot be read, and then nothing else is there."""

    file: str
    problem: str = ""
    certified: bool = False
    words: tuple[tuple[str, str], ...] = ()
    checks: tuple[dict[str, Any], ...] = ()
    why_not: str = ""


def read_certificates(folder: Path) -> list[Certificate]:
    """All certificates in an exported folder."""
    return [read_certificate(path) for path in sorted(folder.glob("*certificate.json"))[:MOST_IN_A_FOLDER]]


def read_certificate(path: Path) -> Certificate:
    """A certificate.json -> what it says. It is another's file: whatever does not fit is said, not raised."""
    try:
        whole = json.loads(read_some(path, MOST_BYTES))
        checks = tuple(
            {name: text(check[name]) for name in ("name", "what", "measured", "limit", "unit", "worst")}
            | {"ok": check["ok"] is True}
            for check in whole["checks"][:MOST_CHECKS]
        )
        certified = (
            whole["certified"] is True
            and bool(checks)
            and all(check["ok"] for check in checks)
            and not whole["why_not"]
        )
        independent = (
            "another program than kobza" if whole["independent"] is True else "kobza's own reader, a weaker proof"
        )
        names = ("name", "form", "engine", "machine", "held_out")
        when = text(whole["date"])[:16].replace("T", " ")
        words = (
            *((name.replace("_", "-"), text(whole[name])) for name in names),
            ("date", when),
            ("proven by", independent),
        )
        return Certificate(path.name, "", certified, words, checks, text(whole["why_not"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Certificate(path.name, f"cannot be read as a certificate ({type(error).__name__}); export again")


def verdict(folder: Path) -> tuple[str, str]:
    """What all certificates of a folder come to: (badge, words)."""
    found = read_certificates(folder)
    good = sum(certificate.certified for certificate in found)
    if good == len(found):
        return ("good", "certified") if found else ("", "no certificate")
    return "bad", f"{len(found) - good} of {len(found)} not certified" if len(found) > 1 else "not certified"


def text(value: Any) -> str:
    """A value of a certificate for a page. text(1.9586e-05) -> "1.96e-05", text(None) -> "none" """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)[:400]
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)[:40]
