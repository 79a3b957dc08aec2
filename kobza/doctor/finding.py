"""What the doctor says and how it comes to say it: Finding, Check, examine -> Outcomes.

A check looks at one subject (a folder, a model, a step function) for one property. It yields findings, or raises Skip: a skipped
check is not a pass. Only what a counter-example proves may be an error; everything else is at most a warning, because a
heuristic can itself be the bug. This file knows no area and imports nothing heavy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kobza.config import InputError

Severity = Literal["error", "warn", "info"]
Confidence = Literal["proven", "likely", "heuristic"]
Status = Literal["ran", "skipped", "failed"]
SEVERITIES: tuple[Severity, ...] = ("error", "warn", "info")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be: its code (`kobza doctor explain CODE`), and where, expected, got as short texts.

    `counterexample` is what proves it: the text, ids, tensor or step at which expected and got part. An error without one is
    a mistake of the check and refused here.
    """

    code: str
    severity: Severity
    confidence: Confidence
    where: str
    """file:key, layer, step or byte offset"""
    expected: str
    got: str
    why: str
    """one line: what it does to the user"""
    fix: str
    """one line, or the value to write"""
    counterexample: str = ""
    source: str = ""
    """a public thread or page about it"""
    patch: dict[str, Any] | None = None
    """what `--fix` writes into its copy: {"file": "config.json", "key": ["rope_scaling", "factor"], "value": 8.0}; a value of
    None with "drop": True takes the key out"""

    def __post_init__(self) -> None:
        proven = self.confidence == "proven"
        assert self.severity != "error" or proven, f"{self.code}: an error must be proven"
        assert not proven or self.counterexample, f"{self.code}: proven by what? give a counterexample"


class Skip(Exception):
    """Raised by a check that cannot be made on this subject: Skip("no lm_head tensor, no tied head to compare")."""


@dataclass(frozen=True)
class Check:
    """run(subject) -> findings. `codes` are those it may report, parted by spaces: "G8" or "C1 C2"; `name` says the property."""

    codes: str
    name: str
    run: Callable[[Any], Iterable[Finding]]


@dataclass(frozen=True)
class Outcome:
    """What came of a check: ran (with its findings), skipped or failed (with the reason), and the milliseconds it took."""

    codes: str
    name: str
    status: Status
    reason: str = ""
    findings: tuple[Finding, ...] = ()
    ms: float = 0.0


@dataclass(frozen=True)
class Examination:
    """Everything that was found out about a subject. `facts` are measured things that are no findings (a table of windows, the
    headroom a module): title -> rows of cells, the first row the header. `plots` are svg texts by title."""

    area: str
    subject: str
    outcomes: tuple[Outcome, ...]
    facts: dict[str, list[list[str]]] = field(default_factory=dict)
    plots: dict[str, str] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """All findings, errors first."""
        found = [finding for outcome in self.outcomes for finding in outcome.findings]
        return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def examine(checks: Iterable[Check], subject: Any, see: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
    """Make the checks one after the other, calling see(outcome) after each. What a subject makes go wrong is an outcome too:
    a check that breaks has failed, and the others are still made."""
    outcomes = []
    for check in checks:
        start = time.perf_counter()
        status, reason, findings = "ran", "", ()
        try:
            findings = tuple(check.run(subject))
        except Skip as skip:
            status, reason = "skipped", str(skip)
        except InputError as error:
            status, reason = "failed", str(error)
        except (Exception, RecursionError) as error:  # the subject is foreign code or a hostile file
            status, reason = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        unknown = {finding.code for finding in findings} - set(check.codes.split())
        assert not unknown, f"check {check.name!r} reports {unknown} and declares {check.codes}"
        ms = 1000 * (time.perf_counter() - start)
        outcomes.append(Outcome(check.codes, check.name, status, reason, findings, ms))  # type: ignore[arg-type]
        see(outcomes[-1])
    return outcomes


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """1: an error was proven; 2: something could not be examined, and nothing was proven; 0 otherwise."""
    outcomes = list(outcomes)
    if any(finding.severity == "error" for outcome in outcomes for finding in outcome.findings):
        return 1
    return 2 if any(outcome.status == "failed" for outcome in outcomes) or not outcomes else 0
