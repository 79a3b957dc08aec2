"""What handing a model on begins with: the model behind a path, one weight at a time, what a tuning alone has learned, the
text it is measured on, and the line of progress meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kobza.checkpoint import find_checkpoint, read_config
from kobza.config import require
from kobza.evals.texts import held_out as held_out_documents
from kobza.evals.texts import read_documents, run_folder
from kobza.export.adapter import Pair
from kobza.export.source import Source, source_of, source_of_loaded
from kobza.hub.store import find_model, sampling
from kobza.recipes.generate import ends_of
from kobza.recipes.tuned import ADAPTER, check_whole, find_base, open_adapter, open_checkpoint, template_of
from kobza.run import open_run
from kobza.tokenizer import Tokenizer


def open_source(path: Path, name: str = "") -> Source:
    """The model behind a run, a checkpoint, a pulled model, or a tuning, whose adapter is merged into a copy in memory."""
    plain = f"--name {name!r}: it names files; use letters, digits, spaces, dots, dashes and underscores"
    require(not name or re.fullmatch(r"\w[\w .+-]{0,99}", name) is not None, plain)
    folder = find_checkpoint(find_model(path))
    run, provenance = read_config(folder / "config.json")
    name = name or path.resolve().name
    about: dict[str, Any] = {"template": template_of(provenance, folder), "sampling": sampling(folder), "name": name}
    if (folder / ADAPTER).exists():
        loaded = open_checkpoint(folder)
        return source_of_loaded(loaded, ends=tuple(ends_of(loaded)), **about)
    check_whole(folder)
    return source_of(folder, **about)


def texts_to_measure(path: Path, given: list[str], tokenizer: Tokenizer, n_tokens: int) -> list[str]:
    """What a person names, else the run's own held-out part, else nothing: then the prose that comes with the certificate."""
    if given:
        documents, _ = read_documents(given, "text", tokenizer, n_tokens)
        require(bool(documents), f"{given[0]}: no text in it that this tokenizer has tokens for")
        return [document.text for document in documents]
    folder = run_folder(find_model(path))
    if folder is None or not (folder / "tokens").is_dir():
        return []
    documents, _ = held_out_documents(open_run(folder), n_tokens)
    return [document.text for document in documents]


class Tuning(NamedTuple):
    """An adapter and the base it was learned beside."""

    folder: Path
    """of its checkpoint, with PEFT's files"""
    base: Source
    base_name: str
    """as the model was called where it came from"""
    pairs: dict[str, Pair]
    """of each module"""
    beside: list[str]
    """what was learned besides, in words"""


def open_tuning(path: Path) -> Tuning:
    """What a tuning learned, not merged."""
    from kobza.finetune.lora import adapters

    folder = find_checkpoint(find_model(path))
    require((folder / ADAPTER).exists(), f"--adapter has no effect: {path} has none; its weights are its own")
    loaded, method = open_adapter(folder, "cpu")
    place = find_base(loaded.provenance, folder)
    pairs, beside = {}, []
    for name, module in adapters(loaded.model).items():
        pairs[name] = Pair(module.lora_a.detach(), module.lora_b.detach(), module.scale)
        beside += ["the lengths of rows (DoRA)"] if module.magnitude is not None else []
    beside += ["the table of tokens"] if method.embeddings else []
    beside += ["new tokens"] if loaded.provenance.get("added_tokens") else []
    beside += ["rows of tokens that the base never trained"] if loaded.provenance.get("mended") else []
    base = loaded.provenance["base"]
    about: dict[str, Any] = {"template": template_of(loaded.provenance, folder), "name": base["name"]}
    source = source_of(place, ends=tuple(ends_of(loaded)), **about)
    return Tuning(folder, source, str(base.get("source") or base["name"]), pairs, list(dict.fromkeys(beside)))


@contextmanager
def bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A line of progress that goes away: progress(what, done, in all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("writing", total=1, visible=False)
        yield lambda what, done, total: shown.update(
            task, description=escape(what[:30]), completed=done, total=total, visible=done < total
        )
