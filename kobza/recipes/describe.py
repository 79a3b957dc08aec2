"""kobza describe: a preset, a run or a TOML file -> its parts with shapes, parameters, FLOPs and bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kobza.config import InputError, RunConfig, load_toml, nearest, preset, preset_names, run_from_dict
from kobza.describe.parts import inference_bytes, parts, total_parameters, training_bytes

CHARACTERS = 65  # of the default text; what vocab_size 0 is shown as


def main(what: str, as_json: bool) -> int:
    """Print the table and the module tree -> exit code."""
    config = find_config(what)
    model = config.model if config.model.vocab_size else replace(config.model, vocab_size=CHARACTERS)
    rows, total = parts(model), total_parameters(model)
    memory = {
        "training_bytes": training_bytes(model, config.train.micro_batch),
        "inference_bytes": inference_bytes(model),
    }
    if as_json:
        table = [asdict(row) | {"parameters": row.parameters} for row in rows]
        print(json.dumps({"parts": table, "parameters": total, **memory, "model": asdict(model)}))
        return 0
    console = Console(highlight=False)
    title = f"{what}: {total:,} parameters (weights and vectors of one copy; FLOPs forward)"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("part", "copies", "shapes", "weights", "vectors", "parameters", "FLOPs/token"):
        left = column in ("part", "shapes")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "shapes")
    for row in rows:
        figures = (row.weights, row.vectors, row.parameters, row.flops_per_token)
        shapes = row.shapes.replace("; ", "\n").replace(", ", "\n")
        table.add_row(row.name, str(row.copies), shapes, *(f"{n:,}" for n in figures))
    table.add_section()
    table.add_row("all", "", "", "", "", f"{total:,}", f"{sum(row.flops_per_token for row in rows):,}")
    console.print(table)
    c = config.train
    print(f"training   up to {size(memory['training_bytes'])} at {c.micro_batch} x {model.max_seq_len} tokens, "
          f"of it {size(training_bytes(model, 0))} for weights, gradients, AdamW")  # fmt: skip
    print(f"inference  {size(memory['inference_bytes'])} with a full KV cache, float32\n")
    from kobza.model import GPT  # here: the table itself needs no torch

    print(GPT(model))
    return 0


def size(n_bytes: float) -> str:
    """size(1_234_567) -> "1.2 MB", size(2_000_000_000) -> "2.0 GB"."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def find_config(what: str) -> RunConfig:
    """The config behind a preset's name, a run's or checkpoint's folder, or a TOML file."""
    path = Path(what)
    if what in preset_names():
        return run_from_dict(preset(what), f"preset {what}")
    if path.suffix == ".toml" and path.is_file():
        return run_from_dict(load_toml(path), what)
    if (path / "config.toml").exists():
        return run_from_dict(load_toml(path / "config.toml"), what)
    if path.is_dir():
        from kobza.checkpoint import find_checkpoint, read_config

        return read_config(find_checkpoint(path) / "config.json")[0]
    raise InputError(f"{what}: neither a preset nor a run nor a TOML file{nearest(what, preset_names())}")


def list_presets(as_json: bool) -> int:
    """Print the presets with their sizes -> exit code."""
    rows = []
    for name in preset_names():
        config = run_from_dict(preset(name), name)
        model = replace(config.model, vocab_size=config.model.vocab_size or CHARACTERS)
        c = config.train
        tokens = c.steps * c.micro_batch * c.accumulate * model.max_seq_len
        rows.append({"name": name, "parameters": total_parameters(model), "steps": c.steps, "tokens": tokens})
    if as_json:
        print(json.dumps({"presets": rows}))
        return 0
    table = Table("preset", "parameters", "steps", "tokens in all")
    for row in rows:
        table.add_row(row["name"], *(f"{row[key]:,}" for key in ("parameters", "steps", "tokens")))
    Console(highlight=False).print(table)
    return 0
