"""A run's folder -> what a list of runs says of it, from its files alone: so a run that a terminal started shows too.

The folder is another process's and may be half written, cut off or no run at all: what cannot be read is left out, not raised.
Whether a process works in it says jobs.py.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kobza.checkpoint import list_checkpoints
from kobza.config import (
    ModelConfig,
    RunConfig,
    flatten,
    preset,
    preset_names,
    require,
    run_from_dict,
    to_dict,
)
from kobza.studio.jobs import worker
from kobza.studio.runs_curves import Record, last_records
from kobza.studio.runs_files import open_regular, read_some, written

MOST_RUNS = 200  # in the list, the newest
MOST_CONFIG = 1 << 20
MOST_SAMPLES = 1 << 18  # bytes from the end of samples.jsonl
FILLED_IN = {"seed", "model.vocab_size", "data.vocab_size"}  # they make no other recipe of it


@dataclass(frozen=True)
class Summary:
    """Where a run stands. None: its folder does not say."""

    name: str
    state: str  # running, starting, finished, stopped, died, empty
    changed: float  # seconds since the epoch
    step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    best: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    n_params: int | None = None
    preset: str = ""
    differs: int = 0
    """settings in which it differs from the preset"""

    @property
    def live(self) -> bool:
        """Whether a process works on it."""
        return self.state in ("running", "starting")


def run_folders(root: Path) -> list[Path]:
    """The folders under the root that look like runs, the newest first."""
    try:
        found = [path for path in root.iterdir() if is_run(path)]
    except OSError:
        return []
    return sorted(found, key=changed, reverse=True)[:MOST_RUNS]


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: one that has settings, or a start that failed. Names that no page can show are left out."""
    if path.name.startswith(".") or any("\ud800" <= c <= "\udfff" for c in path.name):
        return False
    return any((path / name).is_file() for name in ("config.toml", "metrics.jsonl", "job.json", "train.log"))


def find_run(root: Path, name: str) -> Path:
    """The run's folder of a name. It is looked up among those that are there, so a name never becomes a path."""
    found = next((path for path in run_folders(root) if path.name == name), None)
    require(found is not None, f"no run {name[:80]!r} in {root}; the list of runs has those that are there")
    return found  # type: ignore[return-value]


def changed(folder: Path) -> float:
    """When the run last wrote, in seconds since the epoch."""
    return max(
        (written(folder / name) for name in ("metrics.jsonl", "config.toml", "train.log", "job.json")), default=0
    )


# ---- its files -------------------------------------------------------------------------------------------------------


def read_settings(folder: Path) -> dict[str, Any]:
    """The tables of a run's config.toml, {} where it cannot be read."""
    try:
        return tomllib.loads(read_some(folder / "config.toml", MOST_CONFIG).decode())
    except (ValueError, RecursionError):
        return {}


def read_config(folder: Path) -> RunConfig | None:
    """The settings of a run of `kobza train`; None of a tuning, which has others, and of what cannot be read."""
    try:
        settings = read_settings(folder)
        return run_from_dict(settings, folder.name) if settings else None
    except (ValueError, TypeError, OverflowError):
        return None


@lru_cache
def preset_settings(name: str) -> dict[str, Any]:
    """All settings of a preset, flat, the defaults filled in."""
    return as_chosen(run_from_dict(preset(name), name))


def as_chosen(config: RunConfig) -> dict[str, Any]:
    """All settings, flat; what the config derived from others is 0 again, as one who chose nothing wrote it."""
    model = config.model
    derived = {"head_dim": model.n_embd // model.n_head, "n_kv_head": model.n_head, "n_ff": 4 * model.n_embd}
    zeros = {f"model.{name}": 0 for name, value in derived.items() if getattr(model, name) == value}
    return flatten(to_dict(config)) | zeros


def nearest_preset(config: RunConfig) -> tuple[str, dict[str, tuple[Any, Any]]]:
    """The preset that a run differs least from, and {setting: (the run's, the preset's)} where they differ."""
    own = as_chosen(config)
    differ = {
        name: {
            key: (own[key], value)
            for key, value in preset_settings(name).items()
            if own[key] != value and key not in FILLED_IN
        }
        for name in preset_names()
    }
    best = min(differ, key=lambda name: len(differ[name]))
    return best, differ[best]


def read_best(folder: Path) -> float | None:
    """The best validation loss."""
    try:
        value = json.loads(read_some(folder / "best.json", 4096))["val_loss"]
        return float(value)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def read_samples(folder: Path, most: int = 50) -> list[dict[str, Any]]:
    """The last samples {"step", "text"} of a run, the newest first; of a step the one written last."""
    path, found = folder / "samples.jsonl", {}
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - MOST_SAMPLES))
            lines = file.read(MOST_SAMPLES).split(b"\n")[:-1]
    except OSError:
        return []
    for line in lines:
        try:
            sample = json.loads(line.decode("utf-8", "replace"))
            found[int(sample["step"])] = {"step": int(sample["step"]), "text": str(sample["text"])}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return sorted(found.values(), key=lambda sample: -sample["step"])[:most]


def read_log(folder: Path, most: int = 1 << 14) -> str:
    """The end of what a run that the studio started has printed."""
    try:
        with open_regular(folder / "train.log") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


# ---- where it stands -------------------------------------------------------------------------------------------------


def summarise(folder: Path, count: Callable[[ModelConfig], int] | None = None) -> Summary:
    """A run's folder -> where it stands. `count`: a model's weights from its settings. Read again only when it has changed."""
    watched = ("metrics.jsonl", "config.toml", "best.json", "report.html", "checkpoints", "train.log", "job.json")
    return read_summary(folder, (worker(folder), *(written(folder / name) for name in watched)), count)


@lru_cache(2 * MOST_RUNS)
def read_summary(folder: Path, _stamp: tuple[Any, ...], count: Callable[[ModelConfig], int] | None) -> Summary:
    """`summarise`, its files read."""
    records, config = last_records(folder / "metrics.jsonl"), read_config(folder)
    last: Record = records[-1] if records else {}
    vals = [record["val_loss"] for record in records if "val_loss" in record]
    steps = planned_steps(folder)
    name, differs = nearest_preset(config) if config else ("", {})
    state, pace = state_of(folder, last, steps), recent_pace(records)
    left = (steps - last["step"]) / pace if state == "running" and pace and steps else None
    return Summary(
        name=folder.name,
        state=state,
        changed=changed(folder),
        step=last.get("step"),
        steps=steps,
        train_loss=last.get("train_loss"),
        val_loss=vals[-1] if vals else None,
        best=read_best(folder),
        tokens_per_second=last.get("tokens_per_second"),
        seconds_left=left,
        n_params=count(config.model) if count and config and config.model.vocab_size else None,
        preset=name or ("a tuning" if "source" in read_settings(folder) else ""),
        differs=len(differs),
    )


def planned_steps(folder: Path) -> int | None:
    """train.steps of a run or a tuning."""
    train = read_settings(folder).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if type(steps) is int and steps > 0 else None


def recent_pace(records: list[Record]) -> float | None:
    """Steps a second over the last records, evaluations and all."""
    timed = [record for record in records if "seconds" in record]
    if len(timed) < 2 or timed[-1]["seconds"] <= timed[0]["seconds"]:
        return None
    return max(0.0, (timed[-1]["step"] - timed[0]["step"]) / (timed[-1]["seconds"] - timed[0]["seconds"])) or None


def state_of(folder: Path, last: Record, steps: int | None) -> str:
    """running, starting (no step yet), finished, stopped (saved, can go on), died (the last steps are not saved), empty."""
    if worker(folder) is not None:
        return "running" if last else "starting"
    if not last:
        return "died" if written(folder / "train.log") or written(folder / "job.json") else "empty"
    saved = max(list_checkpoints(folder), default=-1)
    reported = written(folder / "report.html") >= written(folder / "metrics.jsonl") > 0
    if saved == last["step"] and (saved == steps or reported):  # reported: ended early by patience or stop_at
        return "finished"
    return "stopped" if saved == last["step"] else "died"
