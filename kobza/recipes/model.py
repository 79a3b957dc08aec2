"""kobza model: the module tree of a built model, from its files; or what its modules put out for a prompt."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kobza.checkpoint import find_checkpoint, read_config
from kobza.config import ModelConfig, require
from kobza.describe.tree import Row, activations, folded, folder_formats, gguf_formats, rows_of
from kobza.formats.headers import read_header
from kobza.formats.load import load_model
from kobza.hub.store import find_model, is_foreign
from kobza.hub.vocabulary import tokenizer_of
from kobza.model import GPT
from kobza.recipes.tuned import check_whole, open_checkpoint
from kobza.surgery import find_modules
from kobza.tokenizer import Tokenizer


def main(what: Path, layer: str | None, hidden: bool, prompt: str | None, as_json: bool) -> int:
    """Print the tree, or activations -> exit code."""
    require(not (layer and hidden), "--hidden shows every block; leave --layer out")
    require(not hidden or prompt is not None, "--hidden needs a --prompt: a text to run")
    acts = layer is not None or hidden
    require(prompt is None or acts, "--prompt has no effect without --layer NAME or --hidden")
    path = what if is_foreign(what) else find_model(what)
    if prompt is None:
        return print_tree(what, path, layer, as_json)
    model, tokenizer = opened(path)
    pattern = "embed,blocks.*" if hidden else str(layer)
    return print_activations(what, model, tokenizer.encode_prompt(prompt), pattern, hidden, as_json)


def opened(path: Path) -> tuple[GPT, Tokenizer]:
    """A model with its weights in float32, and its tokenizer."""
    if not is_foreign(path):
        loaded = open_checkpoint(path)
        return loaded.model, loaded.tokenizer
    foreign = load_model(path)
    return foreign.model, tokenizer_of(path, foreign.kind, foreign.config.vocab_size, None)


# ---- the tree ------------------------------------------------------------------------------------------------------


def tree(path: Path, layer: str | None) -> list[Row]:
    """The tensors of a model, or of its modules of a pattern, by its config and the headers of its files: no weight is read.
    Only of a small trainer's checkpoint, which has no header, the weights are."""
    stored: dict[str, str] = {}
    if is_foreign(path) and path.is_file() and path.suffix != ".gguf":
        foreign = load_model(path)
        model, otherwise = foreign.model, foreign.dtype
    else:
        config, stored = formats(path)
        with torch.device("meta"):
            model, otherwise = GPT(config), "float32"
    rows = rows_of(model, stored, otherwise)
    if layer is None:
        return rows
    found = tuple(f"{name}." for name in find_modules(model, layer, "--layer"))
    return [row for row in rows if row.name.startswith(found)]


def formats(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    """A model's config, and the number formats of its weights on disk by our names."""
    if is_foreign(path):
        return folder_formats(path) if path.is_dir() else gguf_formats(path)
    folder = find_checkpoint(path)
    check_whole(folder)
    header = read_header(folder / "model.safetensors")
    return read_config(folder / "config.json")[0].model, {name: info.dtype for name, info in header.items()}


def print_tree(what: Path, path: Path, layer: str | None, as_json: bool) -> int:
    """Print a model's tensors, blocks that are alike together -> exit code."""
    rows = tree(path, layer)
    total = sum(row.parameters for row in rows)
    if as_json:
        print(json.dumps({"model": str(what), "parameters": total, "tensors": [asdict(row) for row in rows]}))
        return 0
    title = f"{what}: {total:,} parameters"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("tensor", "shape", "format", "parameters", ""):
        table.add_column(column, justify="right" if column == "parameters" else "left", no_wrap=bool(column))
    for row in rows if layer is not None else folded(rows):
        table.add_row(row.name, by(row.shape), row.dtype, f"{row.parameters:,}" if row.parameters else "", row.note)
    Console(highlight=False, markup=False).print(table)
    return 0


def by(shape: list[int]) -> str:
    """by([576, 192]) -> "576x192"."""
    return "x".join(map(str, shape))


# ---- activations ---------------------------------------------------------------------------------------------------


def print_activations(what: Path, model: GPT, ids: list[int], pattern: str, hidden: bool, as_json: bool) -> int:
    """Print what modules put out: one line each -> exit code."""
    seen = activations(model, ids, pattern)
    if hidden:  # blocks.* is also all that lies in a block: the stream is what whole blocks put out
        seen = [one for one in seen if re.fullmatch(r"embed|blocks\.\d+", one.name)]
    if as_json:
        print(json.dumps({"model": str(what), "ids": ids, "activations": [asdict(one) for one in seen]}))
        return 0
    table = Table(
        title=f"{what}: {len(ids)} tokens",
        title_justify="left",
        title_style="",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in ("module", "shape", "rms", "max", "mean", "std"):
        table.add_column(column, justify="left" if column == "module" else "right", no_wrap=True)
    for one in seen:
        first = "" if hidden else "\n  " + " ".join(f"{value:.3g}" for value in one.values) + " ..."
        table.add_row(
            one.name + first, by(one.shape[1:]), *(f"{value:.4g}" for value in (one.rms, one.max, one.mean, one.std))
        )
    legend = [] if hidden else ["below each module the first values of its last token; max is of the sizes"]
    Console(highlight=False, markup=False).print(table, *legend, sep="\n")
    return 0
