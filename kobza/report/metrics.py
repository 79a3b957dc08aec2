"""What a training run left in `metrics.jsonl` -> records and arrays; the other files of this room start here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import InputError

Record = dict[str, Any]  # a line of metrics.jsonl: "step" and whatever numbers were measured at it


def read_metrics(path: str | Path) -> list[Record]:
    """A `metrics.jsonl` -> its records, a list of dicts in order of step.

    A last line cut short (the run was killed while writing) is left out. A resumed run writes some steps again:
    the later writing counts. Anything else that is not a record is an InputError with the line's number.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no metrics at {path}; give the directory of a run that has trained at least one step")
    *lines, tail = path.read_bytes().split(b"\n")  # tail is empty when the last line was written whole
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            add_record(records, parse_record(line, path, number))
    if tail.strip() and not was_cut_short(tail):
        add_record(records, parse_record(tail, path, len(lines) + 1))
    return records


def series(records: list[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Records, a key -> (steps, values): float arrays of the records where the key holds a finite number."""
    kept = [(r["step"], r[key]) for r in records if is_finite(r.get(key))]
    return np.array([s for s, _ in kept], dtype=float), np.array([v for _, v in kept], dtype=float)


def is_number(value: Any) -> bool:
    """True for an int or a float (NaN and infinity too), not for a bool, None or text."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for a number that is neither NaN nor infinite."""
    return is_number(value) and math.isfinite(value)


def was_cut_short(tail: bytes) -> bool:
    """True when the bytes after the last newline are not one JSON value. A cut object never is: it lacks its brace."""
    try:
        json.loads(tail)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        return True
    return False


def parse_record(line: bytes, path: Path, number: int) -> Record:
    """One line -> its record, a dict with an int `step`."""
    where = f"{path}, line {number}"
    shown = line[:60].decode("utf-8", "replace")
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{where} is not JSON: {shown!r}; delete the line, or copy the file again if it was cut in transfer"
        ) from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise InputError(f'{where} has no whole-number "step": {shown!r}; delete the line or give it its step')
    wrong = [k for k, v in record.items() if v is not None and not is_number(v)]
    if wrong:
        raise InputError(f'{where}: "{wrong[0]}" is {record[wrong[0]]!r}, not a number; mend or delete the line')
    return record


def add_record(records: list[Record], record: Record) -> None:
    """Append a record, first dropping those at its step or later: a resumed run wrote them again."""
    while records and records[-1]["step"] >= record["step"]:
        records.pop()
    records.append(record)
