"""One record a step -> metrics.jsonl, and the console's progress line."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kobza.config import InputError

REFRESH_SECONDS = 0.2  # a person sees no more, and each drawing takes a millisecond from the training


class MetricsLog:
    """Appends records to a .jsonl file; each is on disk when the call returns, so a killed run loses no line."""

    def __init__(self, path: Path, after_step: int = 0):
        """`after_step`: keep only the records up to that step, which a resumed run goes on from."""
        self.records = _records_until(path, after_step) if path.exists() else []
        aside = path.with_name(f".{path.name}.part")  # a kill or a full disk here must not cost the records there are
        aside.write_text("".join(_line(record) for record in self.records), encoding="utf-8")
        os.replace(aside, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(record: dict[str, Any]) -> str:
    """A record as a line of strict JSON, which has no nan and no inf."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Records of a metrics file up to a step; a line that a kill cut short is dropped."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            records += [record] if record["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} line {number}: not a record with a step: {line[:60]!r}; delete it") from None
    return records


class ProgressLine:
    """A progress bar with the figures of the last step; prints lines above itself. Silent where no person looks."""

    def __init__(self, console: Console, total: int, done: int = 0):
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, transient=True)
        self.task = self.progress.add_task("train", total=total, completed=done, figures="")
        self.shown = 0.0
        self.live = console.is_terminal
        if self.live:
            self.progress.start()

    def step(self, step: int, figures: str) -> None:
        """Show a step's figures, at most every REFRESH_SECONDS."""
        now = time.perf_counter()
        if self.live and now - self.shown > REFRESH_SECONDS:
            self.shown = now
            self.progress.update(self.task, completed=step, figures=figures, refresh=True)

    def close(self) -> None:
        """Take the line away."""
        if self.live:
            self.progress.stop()
