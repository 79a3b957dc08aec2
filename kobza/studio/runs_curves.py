"""metrics.jsonl, read as it grows -> a table of buckets that a page can draw, never longer than a screen is wide.

A file of 200,000 steps is read once; after that a look costs what was written since. Records are numbered in the order of the
file and fall into buckets of `stretch` records, a power of two that doubles when the table is full, so that all buckets hold
equally many. A bucket keeps lowest, highest, sum and count of each measure: no spike hides, and means stay true. The file is
another process's and may hold anything: a line that is no record is passed over, a number that is none is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from kobza.studio.runs_files import open_regular

MEASURES = ("train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second")
AXES = ("step", "tokens", "seconds")
MOST_BUCKETS = 2048  # more than the pixels across; after a doubling of the stretch at most half of them are left
CHUNK = 4 << 20  # bytes read at once
MOST_BYTES = 1 << 30  # of a metrics file; 7 million steps
MOST_LINE = 1 << 16
TAIL = 1 << 16  # bytes from the end that hold the last records
LARGEST = float(2**53)  # beyond it a step is no whole number for JavaScript

Record = dict[str, Any]


def parse(line: bytes) -> Record | None:
    """A line -> {"step": 3, "train_loss": 2.1, ...} with its finite numbers alone, or None where it is no record.

    parse(b'{"step": 3, "train_loss": NaN, "lr": 0.1}') -> {"step": 3, "lr": 0.1}
    """
    if len(line) > MOST_LINE:
        return None
    try:
        found = json.loads(line)
        record = {key: float(value) for key, value in found.items() if type(value) in (int, float)}
    except (
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
    ):  # not JSON, not an object, 400 digits, 1,000 brackets
        return None
    record = {key: value for key, value in record.items() if math.isfinite(value)}
    step = record.get("step", -1.0)
    return record | {"step": int(step)} if 0 <= step < LARGEST and step.is_integer() else None


def last_records(path: Path) -> list[Record]:
    """The records in the last 64 KB of a metrics file, [] where there is none: enough for where a run stands."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            lines = file.read(TAIL).split(b"\n")
    except OSError:
        return []
    whole = lines[1 if size > TAIL else 0 : -1]  # the first is cut by the seek, the last has no end yet
    return [record for record in map(parse, whole) if record]


def all_records(path: Path) -> list[Record]:
    """Every record of a metrics file in order of step; of a step written twice the later one. For the coach."""
    records: list[Record] = []
    with open_regular(path) as file:
        for record in filter(None, map(parse, file)):
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
            records.append(record)
    return records


class Curves:
    """The curves of one metrics file. `read()` takes in what was written since; `since(...)` gives it as columns."""

    def __init__(self, path: Path):
        self.path, self.lock = path, Lock()
        self.generation = 0  # counts up when what was given out before no longer holds
        self.forget()

    def forget(self) -> None:
        """Begin again at the head of the file."""
        self.generation += 1
        self.offset, self.before, self.n, self.stretch = 0, b"", 0, 1
        self.x = np.zeros((0, 1 + len(AXES)))  # (N, 4) number of the bucket's last record; its step, tokens, seconds
        self.y = np.zeros((0, len(MEASURES), 4))  # (N, M, 4) lowest, highest, sum and count of each measure

    def read(self) -> None:
        """Take in the whole lines that came since the last call."""
        try:
            with self.lock, open_regular(self.path) as file:
                size = min(os.fstat(file.fileno()).st_size, MOST_BYTES)
                if size < self.offset or not self.goes_on(file):
                    self.forget()  # a resumed run writes the file anew
                for lines in self.chunks(file, size):
                    self.take([record for record in map(parse, lines) if record])
        except OSError:  # not there, or not any more
            with self.lock:
                if self.n:
                    self.forget()

    def goes_on(self, file: BinaryIO) -> bool:
        """Whether the file still has, before the offset, what was read there."""
        file.seek(self.offset - len(self.before))
        return file.read(len(self.before)) == self.before

    def chunks(self, file: BinaryIO, size: int) -> Iterator[list[bytes]]:
        """The lines from the offset on, in lists; the offset moves behind the last whole one."""
        while self.offset < size:
            file.seek(self.offset)
            chunk = file.read(min(CHUNK, size - self.offset))
            end = chunk.rfind(b"\n") + 1
            if not end and len(chunk) < CHUNK:
                return  # half a line: its rest is still to come
            end = end or len(chunk)  # a line of 4 MB is none of ours
            self.offset += end
            self.before = chunk[max(0, end - 64) : end]
            yield chunk[:end].split(b"\n")[:-1]

    def take(self, records: list[Record]) -> None:
        """Put records behind those there are, and merge buckets where they have become too many."""
        records = self.in_order(records)
        if not records:
            return
        nothing = math.nan
        x = [[self.n + i, *(record.get(axis, nothing) for axis in AXES)] for i, record in enumerate(records)]
        value = np.array([[record.get(name, nothing) for name in MEASURES] for record in records])
        counted = np.isfinite(value)
        y = np.stack([value, value, np.where(counted, value, 0), counted], axis=-1)  # (R, M, 4)
        self.n += len(records)
        self.x, self.y = np.concatenate([self.x, np.array(x)]), np.concatenate([self.y, y])
        if len(self.x) > MOST_BUCKETS:
            while self.n > self.stretch * MOST_BUCKETS // 2:
                self.stretch *= 2
            self.merge()

    def in_order(self, records: list[Record]) -> list[Record]:
        """The records by rising step: a step that is written again takes away what came from it on."""
        kept: list[Record] = []
        for record in records:
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
            kept.append(record)
        if kept and len(self.x) and kept[0]["step"] <= self.x[-1, 1]:
            stays = self.x[:, 1] < kept[0]["step"]
            self.x, self.y = self.x[stays], self.y[stays]
            self.generation += 1
        return kept

    def merge(self) -> None:
        """Buckets of `stretch` records each, out of smaller ones."""
        place = self.x[:, 0] // self.stretch
        first = np.flatnonzero(np.diff(place, prepend=-1))
        last = np.append(first[1:], len(place)) - 1
        low, high = np.fmin.reduceat(self.y[..., 0], first), np.fmax.reduceat(self.y[..., 1], first)
        with np.errstate(over="ignore"):  # of two losses of 1e308
            total, count = np.add.reduceat(self.y[..., 2], first), np.add.reduceat(self.y[..., 3], first)
        self.x, self.y = self.x[last], np.stack([low, high, total, count], axis=-1)
        self.generation += 1

    def since(self, generation: int, cursor: int) -> dict[str, Any]:
        """What came after record number `cursor`, or all where that was another generation: columns of numbers and nulls.

        {"generation": 1, "cursor": 2, "all": true, "step": [1, 2], ..., "train_loss": {"low": [4.1, null], "high", "mean", ...}}
        """
        with self.lock:
            anew = generation != self.generation or not 0 <= cursor <= self.n
            fresh = slice(None) if anew else self.x[:, 0] >= cursor
            x, y = self.x[fresh], self.y[fresh]
            said: dict[str, Any] = {"generation": self.generation, "cursor": self.n, "all": anew}
        said |= {axis: column(x[:, 1 + i]) for i, axis in enumerate(AXES)}
        for i, name in enumerate(MEASURES):
            low, high, total, count = np.moveaxis(y[:, i], -1, 0)
            if count.any():
                mean = np.divide(total, count, out=np.full_like(total, math.nan), where=count > 0)
                said[name] = {"low": column(low), "high": column(high), "mean": column(mean), "count": column(count)}
        return said


def column(values: np.ndarray) -> list[float | None]:
    """Numbers (N,) -> a list for JSON of seven digits; NaN, which JSON has not, becomes null."""
    return [float(f"{v:.7g}") if math.isfinite(v) else None for v in values.tolist()]
