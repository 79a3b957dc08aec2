"""Rows on disk, and rows -> batches: several side by side in one (packing), or padded beside others of like length (its twin).

A Row of n tokens stands in a batch as n - 1 inputs and the token that follows each. A place in the batch dimension is a line:
rows that follow each other there, or one by itself where nothing is packed. An epoch is a list of batches, a batch a list of
lines; it covers every row once and depends on the seed and its own number alone, so that a resumed run goes on exactly.

Neighbours: encode.py makes the rows, sft.py keeps documents apart that stand in one line. Padding is marked by its document, -1,
never by an id, so no id is lost to it: a pad token that is also the end of text is learned where the end of text is.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kobza.checkpoint import write_folder
from kobza.config import InputError, require
from kobza.finetune.example import Packed, Row
from kobza.train import IGNORE

FORMAT = 1
FILES = ("ids.bin", "learned.bin", "rows.json")
WINDOW = (
    256  # lines packed, or batches grouped, out of one stretch of the shuffled rows: its one half-empty line is 0.4%
)
WIDTH_STEP = {"cpu": 8}  # a CPU's time goes with the tokens, padding too; a GPU wants few shapes
GPU_WIDTH_STEP = 64

Line = list[int]  # rows, by number, that follow each other in one line of a batch

# ---- on disk -------------------------------------------------------------------------------------------------------


def save_rows(folder: Path, rows: list[Row]) -> None:
    """Write rows as a new folder, whole or not at all: ids (int32) and marks (uint8) end to end, the rest as json."""

    def fill(aside: Path) -> None:
        np.concatenate([row.ids for row in rows] or [[]]).astype("<i4").tofile(aside / "ids.bin")
        np.concatenate([row.learned for row in rows] or [[]]).astype(np.uint8).tofile(aside / "learned.bin")
        index: dict[str, Any] = {"format": FORMAT, "lengths": [len(row.ids) for row in rows]}
        index |= {"cut": [row.cut for row in rows], "where": [row.where for row in rows]}
        (aside / "rows.json").write_text(json.dumps(index), encoding="utf-8")

    write_folder(folder, fill)


def load_rows(folder: Path) -> list[Row]:
    """The rows that `save_rows` wrote; InputError where a byte is not as it was."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        ids, learned, text = (_read(folder / name, manifest[name]) for name in FILES)
        return _rows(np.frombuffer(ids, "<i4").astype(np.int32), np.frombuffer(learned, np.uint8), json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = str(error) if isinstance(error, InputError) else f"missing or damaged ({type(error).__name__}: {error})"
        raise InputError(
            f"{folder}: the rows are not as they were written: {what}; make them anew, in another --out"
        ) from None


def _read(path: Path, entry: dict[str, Any]) -> bytes:
    """A file's bytes, if they are those of its entry in the manifest."""
    content = path.read_bytes()
    require(len(content) == entry["bytes"], f"{path.name} has {len(content):,} bytes, not {entry['bytes']:,}")
    require(hashlib.sha256(content).hexdigest() == entry["sha256"], f"{path.name} has another sha256")
    return content


def _rows(ids: np.ndarray, learned: np.ndarray, index: dict[str, Any]) -> list[Row]:
    """Rows out of their parts, each held against the others."""
    require(index["format"] == FORMAT, f"format {index['format']!r}, this kobza knows {FORMAT}")
    lengths, cut, where = index["lengths"], index["cut"], index["where"]
    counts = all(type(n) is int and n > 0 for n in lengths) and all(type(n) is int and n >= 0 for n in cut)
    fits = counts and len(lengths) == len(cut) == len(where) and sum(lengths) == len(ids) == len(learned)
    require(fits, "rows.json does not fit ids.bin and learned.bin")
    require(all(type(name) is str for name in where), "rows.json names a row by what is no text")
    require(not len(ids) or ids.min() >= 0 and learned.max() <= 1, "an id is negative, or a mark neither 0 nor 1")
    ends = np.cumsum(lengths)[:-1]
    parts = zip(np.split(ids, ends), np.split(learned.astype(bool), ends), where, cut, strict=True)
    return [Row(*part) for part in parts] if lengths else []


# ---- batches -------------------------------------------------------------------------------------------------------


class PackedBatches:
    """Endless Packed batches of `micro_batch` lines: with packing of up to max_len tokens each, without it an example a line.
    The last batch of an epoch may hold fewer lines; the loss is a sum over targets, so it counts for no more than it holds."""

    def __init__(
        self,
        rows: list[Row],
        micro_batch: int,
        max_len: int,
        seed: int,
        device: torch.device | None = None,
        packing: bool = True,
    ):
        self.rows, self.micro_batch, self.max_len, self.seed = rows, micro_batch, max_len, seed
        self.device, self.packing = device or torch.device("cpu"), packing
        self.lengths = np.array([len(row.ids) - 1 for row in rows])  # inputs
        assert rows and self.lengths.max() < max_len, f"rows of 1 to {max_len} tokens, cut where they are encoded"
        assert all(row.learned[1:].any() for row in rows), "rows with nothing to learn are left out before"
        self.epoch, self.position = 0, 0
        self.order = self._order(0)

    def __iter__(self) -> Iterator[Packed]:
        return self

    def __next__(self) -> Packed:
        batch = self._batch(self.order[self.position])
        self.position += 1
        if self.position == len(self.order):
            self.epoch, self.position = self.epoch + 1, 0
            self.order = self._order(self.epoch)
        return batch

    @property
    def n_batches_per_epoch(self) -> int:
        """Batches of the present epoch; with packing another one may need one more or less."""
        return len(self.order)

    @property
    def padding(self) -> float:
        """Share of the present epoch's places that hold no token."""
        places = sum(len(lines) * self._width(lines) for lines in self.order)
        return 1 - int(self.lengths.sum()) / places

    def largest(self) -> Packed:
        """The present epoch's batch of most places, of those the one with most targets: what memory must suffice for."""

        def size(lines: list[Line]) -> tuple[int, int]:
            return len(lines) * self._width(lines), sum(int(self.rows[i].learned.sum()) for line in lines for i in line)

        return self._batch(max(self.order, key=size))

    def _order(self, epoch: int) -> list[list[Line]]:
        """The batches of an epoch."""
        arrange = packed_epoch if self.packing else grouped_epoch
        return arrange(self.lengths, self.micro_batch, self.max_len, np.random.default_rng((self.seed, epoch)))

    def _width(self, lines: list[Line]) -> int:
        """T of a batch: its longest line's tokens, rounded up for fewer shapes."""
        step = WIDTH_STEP.get(self.device.type, GPU_WIDTH_STEP)
        longest = max(int(self.lengths[line].sum()) for line in lines)
        return min(-(-longest // step) * step, self.max_len)

    def _batch(self, lines: list[Line]) -> Packed:
        return collate([[self.rows[i] for i in line] for line in lines], self._width(lines), self.device)

    def state_dict(self) -> dict[str, int]:
        """Where the order stands, and what it was made of."""
        return {"epoch": self.epoch, "position": self.position} | self._made_of()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where state_dict was taken."""
        other = {name: state.get(name) for name in self._made_of()}
        assert other == self._made_of(), f"an order of {other}, not {self._made_of()}"
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self._order(self.epoch)

    def _made_of(self) -> dict[str, int]:
        names = ("seed", "micro_batch", "max_len", "packing")
        return {name: int(getattr(self, name)) for name in names} | {"tokens": int(self.lengths.sum())}


def eval_rows(
    rows: list[Row], micro_batch: int, max_len: int, device: torch.device | None = None, packing: bool = True
) -> list[Packed]:
    """Every row once, as batches on the device; the same ones at every call."""
    batches = PackedBatches(rows, micro_batch, max_len, 0, device, packing)
    return [next(batches) for _ in range(batches.n_batches_per_epoch)]


def packed_epoch(
    lengths: np.ndarray, micro_batch: int, max_len: int, generator: np.random.Generator
) -> list[list[Line]]:
    """Batches of packed lines. The shuffled rows are packed stretch by stretch, so that who stands beside whom, and when, is
    drawn by the seed, and the lines are shuffled again."""
    order = generator.permutation(len(lengths))
    stretch = (np.cumsum(lengths[order]) - 1) // (WINDOW * max_len)
    lines = []
    for rows in np.split(order, np.flatnonzero(np.diff(stretch)) + 1):
        lines += [[int(rows[i]) for i in line] for line in best_fit(lengths[rows], max_len)]
    lines = [lines[i] for i in generator.permutation(len(lines))]
    return _cut(lines, micro_batch)


def grouped_epoch(
    lengths: np.ndarray, micro_batch: int, max_len: int, generator: np.random.Generator
) -> list[list[Line]]:
    """Batches of single rows of like length, in random order: stretches of the shuffled rows are sorted, then cut."""
    order, stretch = generator.permutation(len(lengths)), WINDOW * micro_batch
    batches = []
    for at in range(0, len(order), stretch):
        rows = order[at : at + stretch]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += _cut([[int(i)] for i in rows], micro_batch)
    return [batches[i] for i in generator.permutation(len(batches))]


def best_fit(lengths: np.ndarray, room: int) -> list[Line]:
    """Lines of at most `room` tokens: from the longest down, each row goes where it leaves the least room (Johnson 1973: at
    most 11/9 of the fewest lines). best_fit([3, 5, 2], 8) -> [[1, 0], [2]]"""
    lines: list[Line] = []
    free: list[tuple[int, int]] = []  # room left and the line it is in, ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect_left(free, (length, 0))
        left, line = free.pop(at) if at < len(free) else (room, len(lines))
        if line == len(lines):
            lines.append([])
        lines[line].append(i)
        insort(free, (left - length, line))
    return lines


def _cut(lines: list[Line], micro_batch: int) -> list[list[Line]]:
    return [lines[at : at + micro_batch] for at in range(0, len(lines), micro_batch)]


def collate(lines: list[list[Row]], width: int, device: torch.device | None = None) -> Packed:
    """Lines of rows side by side -> Packed (B, width). The first token of a row is never a target, its last never an input, so
    no target is taken from a neighbour."""
    places = np.zeros((4, len(lines), width), np.int64)
    inputs, targets, positions, documents = places
    targets[:], documents[:] = IGNORE, -1
    for b, line in enumerate(lines):
        at = 0
        for document, row in enumerate(line):
            n = len(row.ids) - 1
            span = slice(at, at + n)
            inputs[b, span], positions[b, span], documents[b, span] = row.ids[:-1], np.arange(n), document
            targets[b, span] = np.where(row.learned[1:], row.ids[1:], IGNORE)
            at += n
        assert at <= width, f"a line of {at} tokens in a batch {width} wide"
    return Packed(*torch.from_numpy(places).to(device or torch.device("cpu")))  # one copy to the device
