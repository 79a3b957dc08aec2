"""kobza describe: a preset, a run or a TOML file -> its parts with shapes, parameters, FLOPs and bytes, and its equations."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kobza.config import InputError, ModelConfig, RunConfig, load_toml, nearest, preset, preset_names, run_from_dict
from kobza.describe.equations import Equation, equations
from kobza.describe.parts import inference_bytes, parts, total_parameters, training_bytes
from kobza.hub.store import find_model, model_names

CHARACTERS = 65  # of the default text
ENCODED = {
    "byte": 256,
    "gpt2": 50_257,
    "r50k_base": 50_257,
    "p50k_base": 50_281,
    "cl100k_base": 100_277,
    "o200k_base": 200_019,
}


def main(what: str, as_json: bool) -> int:
    """Print the parts, the equations and the module tree -> exit code."""
    config = find_config(what)
    model = with_vocabulary(config)
    rows, total = parts(model), total_parameters(model)
    memory = {
        "training_bytes": training_bytes(model, config.train.micro_batch),
        "inference_bytes": inference_bytes(model),
    }
    best = best_losses(what)
    if as_json:
        losses = {"best": best} if best else {}
        table = [asdict(row) | {"parameters": row.parameters} for row in rows]
        lines = [line._asdict() for line in equations(model, config.train)]
        figures = {"parts": table, "parameters": total, **memory, **losses}
        print(json.dumps(figures | {"equations": lines, "model": asdict(model)}))
        return 0
    console = Console(highlight=False, markup=False)  # E[t] is no markup
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
    console.print(table, "", sep="\n")
    print_equations(console, equations(model, config.train))
    c = config.train
    print(f"training   up to {size(memory['training_bytes'])} at {c.micro_batch} x {model.max_seq_len} tokens, "
          f"of it {size(training_bytes(model, 0))} for weights, gradients, AdamW")  # fmt: skip
    print(f"inference  {size(memory['inference_bytes'])} with a full KV cache, float32")
    if best:
        losses = f"{best['val_loss']:.4f} nats a token, {best['val_bpb']:.4f} bits a byte"
        print(f"losses     validation {losses} at step {best['step']:,}")
    print()
    import torch  # here: the table itself needs none

    from kobza.model import GPT

    with torch.device("meta"):  # the tree alone: a model beyond this machine's memory can be described too
        print(GPT(model))
    return 0


def print_equations(console: Console, lines: list[Equation]) -> None:
    """Each equation beside its shapes, or above them where the terminal is too narrow."""
    widest = max(len(line.equation) for line in lines)
    wide = console.width >= 14 + widest + 30
    table = Table("part", "equation", box=SIMPLE, padding=(0, 2, 0, 0), show_edge=False)
    if wide:
        table.add_column("shapes (rows × columns)")
    for line in lines:
        shapes = line.shapes.replace("; ", "\n")
        if wide:
            table.add_row(line.what, line.equation, shapes)
        else:
            below = [f"    {each}" for each in shapes.splitlines()]
            table.add_row(line.what, "\n".join([line.equation, *below]))
    legend = "x: one token's vector, i its place, t its id; ⊙ by components; q, k, v, s, p of one head"
    console.print(table, legend, "", sep="\n")


def size(n_bytes: float) -> str:
    """size(1_234_567) -> "1.2 MB", size(2_000_000_000) -> "2.0 GB"."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def with_vocabulary(config: RunConfig) -> ModelConfig:
    """The model with the vocabulary that its tokenizer will have; of characters, as many as the default text has."""
    size = config.model.vocab_size or config.data.vocab_size or ENCODED.get(config.data.tokenizer, CHARACTERS)
    return replace(config.model, vocab_size=size)


def best_losses(what: str) -> dict[str, float] | None:
    """The best evaluation of a run: step, val_loss in nats a token, val_bpb in bits a byte. None for what is no run."""
    path = Path(what) / "metrics.jsonl"
    if not path.is_file():
        return None
    from kobza.report.metrics import is_finite, read_metrics  # here: it needs numpy, the table does not

    records = [record for record in read_metrics(path) if is_finite(record.get("val_bpb"))]
    best = min(records, key=lambda record: record["val_loss"], default=None)
    return best and {key: best[key] for key in ("step", "val_loss", "val_bpb")}


def find_config(what: str) -> RunConfig:
    """The config behind a preset's name, a run's or checkpoint's folder, or a TOML file."""
    if what in preset_names():
        return run_from_dict(preset(what), f"preset {what}")
    path = find_model(Path(what)) if what in model_names() else Path(what)
    if path.suffix == ".toml" and path.is_file():
        return run_from_dict(load_toml(path), what)
    if (path / "config.toml").exists():
        return run_from_dict(load_toml(path / "config.toml"), what)
    if path.is_dir():
        from kobza.checkpoint import find_checkpoint, read_config

        return read_config(find_checkpoint(path) / "config.json")[0]
    names = [*preset_names(), *model_names()]
    raise InputError(f"{what}: neither a preset nor a run nor a TOML file, nor a pulled model{nearest(what, names)}")


def list_presets(as_json: bool) -> int:
    """Print the presets with their sizes -> exit code."""
    rows = []
    for name in preset_names():
        config = run_from_dict(preset(name), name)
        model = with_vocabulary(config)
        steps = config.train.steps
        sizes = {"parameters": total_parameters(model), "steps": steps, "tokens": steps * config.batch_tokens}
        rows.append({"name": name} | sizes)
    if as_json:
        print(json.dumps({"presets": rows}))
        return 0
    table = Table("preset", "parameters", "steps", "tokens in all")
    for row in rows:
        table.add_row(row["name"], *(f"{row[key]:,}" for key in ("parameters", "steps", "tokens")))
    Console(highlight=False).print(table)
    return 0
