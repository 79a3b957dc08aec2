"""The metrics that some trainer left -> records under one set of names. Reads kobza's metrics.jsonl, any CSV or JSONL with a
step in it, and the trainer_state.json of transformers. Knows nothing of what is right or wrong with them, and loads no torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kobza.config import InputError, RunConfig, load_toml, require, run_from_dict

MOST_BYTES = 1 << 29  # half a gigabyte is some 3 million steps
MOST_RECORDS = 3_000_000

# How trainers call what we call the first name, once everything but letters is gone.
NAMES = {
    "step": "step globalstep iter iteration iternum iterations it update updates trainglobalstep trainerglobalstep nupdates",
    "train_loss": "trainloss loss trainingloss trainlossstep losstrain lossmean trainlm lmloss",
    "val_loss": "valloss evalloss validationloss validloss devloss lossval losseval testloss",
    "lr": "lr learningrate trainlr trainlearningrate lradamw rate",
    "grad_norm": "gradnorm gradientnorm traingradnorm gnorm norm globalgradnorm totalnorm",
    "tokens_per_second": "tokenspersecond tokenspersec toks toksec tokps tps throughput traintokenspersecond toksecgpu",
    "batch_hash": "batchhash datahash batchsha",
    "seconds": "seconds elapsed time walltime runtime elapsedseconds",
}
KNOWN = {alias: name for name, aliases in NAMES.items() for alias in aliases.split()}


@dataclass(frozen=True)
class Log:
    """A trainer's metrics. records: in the order of the file, under the names of NAMES, numbers as floats, nan and inf as they
    stand; `config` and `folder`: of a run of kobza's; `vocab_size`: 0 where unknown."""

    path: Path
    records: list[dict[str, Any]]
    config: RunConfig | None = None
    folder: Path | None = None
    vocab_size: int = 0

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the records that have the key, in order of the last writing of each step."""
        kept: dict[float, float] = {}
        for record in self.records:
            if isinstance(record.get(key), float):
                kept[record["step"]] = record[key]
        steps = sorted(kept)
        return np.array(steps), np.array([kept[s] for s in steps])

    def finite(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """`series` without what is not finite."""
        steps, values = self.series(key)
        good = np.isfinite(values)
        return steps[good], values[good]

    @property
    def restarts(self) -> list[int]:
        """Indices of the records before which the trainer was started again: its step or its clock went back."""
        found, last = [], {"step": -math.inf, "seconds": -math.inf}
        for i, record in enumerate(self.records):
            if "train_loss" not in record:
                continue  # evaluations may be written apart
            now = {
                key: record[key] for key in last if isinstance(record.get(key), float) and math.isfinite(record[key])
            }
            if any(value < last[key] for key, value in now.items()):
                found.append(i)
            last |= now
        return found


def read_log(path: Path, vocab_size: int = 0) -> Log:
    """A kobza run folder, or a .jsonl, .csv, .tsv or trainer_state.json -> its Log."""
    require(path.exists(), f"{path}: no such file or folder; give a run folder, or a .csv or .jsonl of metrics")
    if path.is_dir():
        return read_folder(path, vocab_size)
    if path.name == "metrics.jsonl" and (path.parent / "config.toml").is_file():
        return read_folder(path.parent, vocab_size)
    return Log(path, read_records(path), vocab_size=vocab_size)


def read_folder(folder: Path, vocab_size: int) -> Log:
    """A folder: a kobza run, or one that holds a file of metrics."""
    names = ("metrics.jsonl", "trainer_state.json", "log.jsonl", "metrics.csv", "log.csv")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    require(path is not None, f"{folder}: none of {', '.join(names)} is there; name the file of metrics")
    assert path is not None
    config = None
    if (folder / "config.toml").is_file():
        config = run_from_dict(load_toml(folder / "config.toml"), str(folder / "config.toml"))
        vocab_size = vocab_size or config.model.vocab_size
    return Log(path, read_records(path, config is not None), config, folder if config else None, vocab_size)


def read_records(path: Path, ours: bool = False) -> list[dict[str, Any]]:
    """The records of a file. `ours`: kobza writes null where a number was not finite, others where there was none."""
    size = path.stat().st_size
    require(
        size <= MOST_BYTES,
        f"{path}: {size / 1e6:,.0f} MB of metrics, and at most {MOST_BYTES / 1e6:,.0f} are read; thin it out",
    )
    text = path.read_text(encoding="utf-8", errors="replace")
    kind = path.suffix.lower()
    if kind == ".json":
        rows = from_history(path, text)
    elif kind in (".csv", ".tsv"):
        rows = from_table(path, text, "\t" if kind == ".tsv" else ",")
    else:
        rows = from_lines(path, text)
    require(bool(rows), f"{path}: no record in it; a run writes one at its first step")
    require(
        len(rows) <= MOST_RECORDS, f"{path}: {len(rows):,} records, and at most {MOST_RECORDS:,} are read; thin it out"
    )
    names = rename(path, rows)
    records = [r for r in (to_record(row, names, ours) for row in rows) if "step" in r]
    require(any("train_loss" in r or "val_loss" in r for r in records), lacks(path, "loss", rows))
    return records


def from_lines(path: Path, text: str) -> list[dict[str, Any]]:
    """JSON objects, one a line; a last line that a kill cut short is left out."""
    rows, lines = [], text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise InputError(
                f"{path} line {number}: not JSON: {line[:60]!r}; delete the line, or name a .csv as .csv"
            ) from None
        require(isinstance(row, dict), f"{path} line {number}: not an object with a step: {line[:60]!r}")
        rows.append(row)
    return rows


def from_table(path: Path, text: str, comma: str) -> list[dict[str, Any]]:
    """Rows of a CSV with a header."""
    csv.field_size_limit(1 << 20)
    try:
        return list(csv.DictReader(io.StringIO(text), delimiter=comma))
    except csv.Error as error:
        raise InputError(f"{path}: not CSV: {error}") from None


def from_history(path: Path, text: str) -> list[dict[str, Any]]:
    """log_history of a trainer_state.json, without the summary at its end, whose train_loss is a mean of all steps."""
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON; give a trainer_state.json, .jsonl or .csv") from None
    rows = state.get("log_history") if isinstance(state, dict) else state
    good = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    require(good, f"{path}: no log_history, a list of records, in it; give a trainer_state.json, .jsonl or .csv")
    return [row for row in rows if "train_runtime" not in row]  # type: ignore[union-attr]


def rename(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Their columns -> ours. Where several columns could be one of ours the plainest name wins."""
    columns = dict.fromkeys(key for row in rows[:2000] for key in row if isinstance(key, str))
    names: dict[str, str] = {}
    for column in columns:
        ours = KNOWN.get(re.sub("[^a-z]", "", column.lower()))
        if ours and ours not in names.values():
            names[column] = ours
        elif ours and column == ours:  # the very name beats one that only means it
            names = {c: n for c, n in names.items() if n != ours} | {column: ours}
    require("step" in names.values(), lacks(path, "step", rows))
    return names


def lacks(path: Path, what: str, rows: list[dict[str, Any]]) -> str:
    """The complaint about a column that is not there."""
    columns = ", ".join(str(key) for key in list(rows[0])[:12])
    return (
        f"{path}: no column for the {what}; it has {columns}; rename one to {'train_loss' if what == 'loss' else what}"
    )


def to_record(row: dict[str, Any], names: dict[str, str], ours: bool) -> dict[str, Any]:
    """A row under our names; cells that are empty or no numbers are left out."""
    record: dict[str, Any] = {}
    for column, name in names.items():
        value = row.get(column)
        if name == "batch_hash":
            record |= {name: str(value)} if value not in (None, "") else {}
        elif isinstance(value, bool):
            continue
        elif value is None and ours and column in row:
            record[name] = math.nan
        elif isinstance(value, int | float | str):
            try:
                record[name] = float(value)
            except (ValueError, OverflowError):
                continue
    if not math.isfinite(record.get("step", math.nan)):
        record.pop("step", None)
    return record
