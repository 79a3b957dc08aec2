"""The models of this machine for the studio: the runs in a folder and what was pulled, opened when asked for and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kobza.checkpoint import Loaded, find_checkpoint
from kobza.config import InputError, nearest
from kobza.formats.chat import ChatEncoder
from kobza.hub.store import find_model, model_names
from kobza.recipes.generate import ends_of, open_model
from kobza.recipes.tuned import template_of
from kobza.studio.app import Name

KEPT = 3  # models in memory at once; the one not used for longest goes


@dataclass(frozen=True)
class Playable:
    """A model in memory, and how it is talked to."""

    loaded: Loaded
    ends: list[int]
    chat: Callable[[list[dict[str, Any]]], list[int]] | None


class Shelf:
    """Models by name. Shelf(Path("runs")).open("demo") -> Playable"""

    def __init__(self, runs: Path, precision: str = "auto"):
        self.runs, self.precision = runs, precision
        self._open: OrderedDict[Path, tuple[Any, Playable]] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[Name]:
        """Runs with a checkpoint, newest first, then pulled models."""
        found = [folder for folder in self.runs.glob("*") if any(folder.glob("checkpoints/*/manifest.json"))]
        found.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        taken = {folder.name for folder in found}
        runs = [Name(folder.name, "run") for folder in found]
        return [*runs, *(Name(name, "model", "pulled") for name in model_names() if name not in taken)]

    def open(self, name: str) -> Playable:
        """The model of a name; a run that has been trained on since is opened anew."""
        known = {known.name: known.kind for known in self.names()}
        if name not in known:
            hint = nearest(name[:80], list(known)) if known else "; train one: kobza demo"
            raise InputError(f"no model {name[:80]!r} here{hint}")
        path = self.runs / name if known[name] == "run" else Path(name)
        folder = find_checkpoint(find_model(path))
        with self._lock:
            stamp = (folder / "manifest.json").stat().st_mtime_ns
            if self._open.get(folder, (None,))[0] != stamp:
                self._open[folder] = (stamp, self._read(path))
            self._open.move_to_end(folder)
            while len(self._open) > KEPT:
                self._open.popitem(last=False)
            return self._open[folder][1]

    def _read(self, path: Path) -> Playable:
        loaded = open_model(path, "auto", self.precision, None)
        template = template_of(loaded.provenance, loaded.folder)
        if template is None:
            return Playable(loaded, ends_of(loaded), None)
        encoder = ChatEncoder(template, loaded.tokenizer)
        return Playable(loaded, ends_of(loaded), lambda messages: encoder.encode(messages, add_generation_prompt=True))
