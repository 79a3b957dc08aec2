"""What the room of runs keeps between two looks: curves read so far, what the coach said last. And what a coach is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Protocol

from kobza.config import InputError, require
from kobza.studio.runs_curves import Curves, Record, all_records
from kobza.studio.runs_files import written

MOST_CURVES = 24  # files whose curves are kept in memory
MOST_COACHED = 64 << 20  # bytes of metrics that the coach, who reads them whole, is asked about


class Spoken(NamedTuple):
    """A remark of our own."""

    severity: str
    step: int
    text: str
    remedy: str = ""


class Remark(Protocol):
    """What a coach says: see kobza.report.coach."""

    @property
    def severity(self) -> str: ...  # "info" or "warning"
    @property
    def step(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def remedy(self) -> str: ...


class Coach(Protocol):
    """What an experienced friend knows of a run. Both may raise InputError, in words, for a run that cannot be read."""

    def landmarks(self, folder: Path) -> Mapping[str, float]:
        """{"uniform": ..., "unigram": ..., "bigram": ...}: losses in nats a token that mean something for the run's text."""

    def remarks(self, folder: Path, records: list[Record]) -> Sequence[Remark]:
        """What there is to say of the run as it stands."""


class Book:
    """What is kept between two looks at the runs: curves read so far, and what the coach said last."""

    def __init__(self, root: Path, coach: Coach | None):
        self.root, self.coach, self.lock = root, coach, Lock()
        self.kept: OrderedDict[Path, Curves] = OrderedDict()
        self.said: dict[Path, tuple[tuple[float, ...], list[Remark]]] = {}
        self.marks: dict[tuple[Path, float], dict[str, float]] = {}

    def curves(self, folder: Path) -> Curves:
        """The curves of a run, read up to now."""
        with self.lock:
            found = self.kept.setdefault(folder, Curves(folder / "metrics.jsonl"))
            self.kept.move_to_end(folder)
            while len(self.kept) > MOST_CURVES:
                self.kept.popitem(last=False)
        found.read()
        return found

    def remarks(self, folder: Path) -> list[Remark]:
        """The coach's remarks, asked anew after each evaluation and when the run has ended."""
        path = folder / "metrics.jsonl"
        stamp = tuple(written(folder / name) for name in ("samples.jsonl", "report.html", "best.json"))
        if self.coach is None or not written(path):
            return []
        if self.said.get(folder, ((), []))[0] != stamp:
            try:
                require(
                    path.stat().st_size <= MOST_COACHED,
                    f"too long to be read here; in a terminal: kobza report {folder}",
                )
                records = all_records(path)
                found = list(self.coach.remarks(folder, records)) if records else []
            except (InputError, OSError) as error:
                found = [Spoken("info", 0, f"The coach cannot read this run: {error}")]
            self.said[folder] = (stamp, found)
        return self.said[folder][1]

    def landmarks(self, folder: Path) -> dict[str, float]:
        """The landmarks of a run's text, {} where they cannot be told."""
        key = (folder, written(folder / "tokenizer.json"))
        if self.coach and key not in self.marks and key[1]:
            try:
                self.marks[key] = dict(self.coach.landmarks(folder))
            except (InputError, OSError):
                self.marks[key] = {}
        return self.marks.get(key, {})
