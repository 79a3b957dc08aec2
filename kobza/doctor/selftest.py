"""The doctor examined: every check against injected bugs and clean controls -> how many are caught, and how many false alarms.

An area is a module with CHECKS; mutations/<area>.py holds its MUTATIONS and CONTROLS. A mutation is caught when a finding
bears its own code; on a control any finding at all is a false alarm. A code that a check may report and no mutation injects is
a hole in the proof, and reported as such. The two rates are told apart: a doctor that always cries has a perfect detection rate.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from kobza.doctor.finding import Outcome, examine
from kobza.doctor.mutations.proof import Control, Mutation

# area -> the module with its checks, in the order in which selftest goes through them
AREAS = {
    "config": "files.config",
    "tokenizer": "files.tokenizer",
    "template": "files.template",
    "gguf": "files.gguf",
    "data": "training.data",
    "model": "models.battery",
    "parity": "models.parity",
    "train": "training.train",
    "run": "training.run",
    "adapter": "files.adapter",
}


@dataclass(frozen=True)
class Trial:
    """One subject under all checks of its area. `expected`: the code injected, empty for a control; `found`: the codes reported;
    `broken`: the checks that could not be made, with the reason."""

    area: str
    name: str
    expected: str
    found: tuple[str, ...]
    broken: tuple[str, ...]
    seed: int
    dtype: str
    seconds: float

    @property
    def good(self) -> bool:
        """A mutation caught by its own code; a control with nothing found and nothing broken."""
        return self.expected in self.found if self.expected else not self.found and not self.broken


def area_module(area: str) -> ModuleType:
    """The module with the area's CHECKS."""
    return importlib.import_module(f"kobza.doctor.{AREAS[area]}")


def proof_module(area: str) -> ModuleType:
    """The module with the area's MUTATIONS and CONTROLS."""
    return importlib.import_module(f"kobza.doctor.mutations.{area}")


def trials(area: str, seeds: int = 3) -> Iterator[Trial]:
    """Controls at every seed in fp32 and bf16, mutations at one seed in fp32."""
    checks, proof = area_module(area), proof_module(area)
    plan = [(control, seed, dtype) for control in proof.CONTROLS for seed in range(seeds) for dtype in ("fp32", "bf16")]
    plan += [(mutation, 0, "fp32") for mutation in proof.MUTATIONS]
    for item, seed, dtype in plan:
        yield run_trial(area, checks.CHECKS, item, seed, dtype)


def run_trial(area: str, checks: tuple, item: Mutation | Control, seed: int, dtype: str) -> Trial:
    """Make the subject in a folder of its own, examine it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kobza-selftest-") as folder:
        outcomes = examine(checks, item.make(Path(folder), seed, dtype))
    expected = item.code if isinstance(item, Mutation) else ""
    found, broken = codes_found(outcomes), tuple(f"{o.codes}: {o.reason}" for o in outcomes if o.status == "failed")
    return Trial(area, item.name, expected, found, broken, seed, dtype, time.perf_counter() - start)


def codes_found(outcomes: list[Outcome]) -> tuple[str, ...]:
    """The codes of all findings, each once, sorted."""
    return tuple(sorted({finding.code for outcome in outcomes for finding in outcome.findings}))


def unproven(area: str) -> list[str]:
    """Codes that a check of the area may report and no mutation injects."""
    checks, proof = area_module(area), proof_module(area)
    declared = {code for check in checks.CHECKS for code in check.codes.split()}
    return sorted(declared - {mutation.code for mutation in proof.MUTATIONS})


@dataclass(frozen=True)
class Rates:
    """caught of injected, alarms of clean."""

    caught: int
    injected: int
    alarms: int
    clean: int

    @property
    def good(self) -> bool:
        """At least 95% caught, and no false alarm."""
        return self.alarms == 0 and self.caught >= 0.95 * self.injected


def rates(done: list[Trial]) -> Rates:
    """The two rates, kept apart."""
    injected, clean = [t for t in done if t.expected], [t for t in done if not t.expected]
    return Rates(sum(t.good for t in injected), len(injected), sum(not t.good for t in clean), len(clean))
