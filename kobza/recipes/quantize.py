"""kobza quantize: a model's weights in few bits, and what that costs, overall and weight by weight.

The types of our own runtime give a checkpoint; ggml's give the report, and `plan_types` the exporter's overrides for --max-kl.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kobza.checkpoint import Loaded
from kobza.config import nearest, require
from kobza.device import make_runtime, memory_error
from kobza.evals.score import opening
from kobza.export.proof.corpus import corpus_for
from kobza.model import GPT
from kobza.quant.damage import Reference, Rounded, choose, ladder, sensitivities
from kobza.quant.forms import matrices, n_bytes, quantise
from kobza.quant.page import damage_page
from kobza.quant.saved import FILE, save_quantised
from kobza.recipes.shipping import bar, texts_to_measure
from kobza.recipes.tuned import open_checkpoint

OURS = ("int8", "nf4")
WINDOW = 512  # tokens of a sequence, or the model's context
ALONE = 256  # tokens on which each weight alone is measured
SHOWN = 10  # weights, the worst first
Types = dict[str, str]
Shown = Callable[[str, int, int], None]


def main(
    run: Path,
    out: Path | None,
    to: str,
    max_kl: float | None,
    calibration: list[str],
    n_tokens: int,
    device: str,
    as_json: bool,
) -> int:
    """Quantise and measure -> exit code."""
    check(run, out, to, max_kl, n_tokens)
    console = Console(stderr=as_json, highlight=False)
    loaded = open_checkpoint(run, make_runtime(device, "fp32").device)
    few = f"{run}: its weights are in few bits already; quantise the model it was made from"
    require("quantised" not in loaded.provenance, few)
    wanted = starting_types(loaded, to)
    texts = texts_to_measure(run, calibration, loaded.tokenizer, n_tokens)
    text = "the text given" if calibration else "its held-out part" if texts else "prose that comes with kobza"
    batches = batches_of(texts, loaded, n_tokens)
    with memory_error(len(batches[0]), batches[0].shape[1]), bar(console) as progress:
        report, types = measured(loaded, wanted, batches, max_kl, progress=progress)
    report = {
        "model": str(run),
        "to": to,
        "text": text,
        "max_kl": max_kl,
        "bytes_before": bytes_before(loaded),
    } | report
    if out is not None:
        quantise(loaded.model, types)
        pages = {"damage.json": json.dumps(report, indent=1), "damage.html": damage_page(report)}
        own = {name: value for name, value in loaded.provenance.items() if name not in ("base", "method", "objective")}
        own["quantised_from"] = str(run)  # and of a tuning, whose adapter is in the weights now, no base
        save_quantised(out, loaded.model, replace(loaded, provenance=own), types, pages)
        report |= {"out": str(out), "bytes_after": (out / FILE).stat().st_size}
    if as_json:
        print(json.dumps(report))
    else:
        tell(console, report, run, out)
    return 0


def check(run: Path, out: Path | None, to: str, max_kl: float | None, n_tokens: int) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    from kobza.export.types import FILE_TYPES

    known = [*OURS, *FILE_TYPES, "Q4_K", "Q5_K"]
    require(to in OURS or to.upper() in known, f"--to is {to!r}; it is one of {', '.join(known)}{nearest(to, known)}")
    gguf = f"--out {out}: {to} is for GGUF files, which export writes: kobza export {run} --to gguf --types {to}"
    bound = "" if max_kl is None else f" --max-kl {max_kl:g}"
    require(out is None or to in OURS, f"{gguf}{bound}")
    require(out is None or not out.exists(), f"--out {out} is there; name a new folder")
    require(max_kl is None or max_kl > 0, f"--max-kl is {max_kl}; it must be above 0, in nats a token")
    require(n_tokens >= 2, f"--tokens is {n_tokens}; it must be at least 2")


# ---- what to measure -----------------------------------------------------------------------------------------------


def starting_types(loaded: Loaded, to: str) -> Types:
    """The type of each weight before anything is kept wider. In nf4 tables and head are int8; a table of positions stays."""
    if to not in OURS:
        return ggml_types(loaded, to)
    names = [name for name in matrices(loaded.model) if name != "position.weight"]
    return {name: to if name.startswith("blocks.") else "int8" for name in names}


def ggml_types(loaded: Loaded, to: str, weighed: bool = False) -> Types:
    """The types of llama.cpp's mixture, by our names."""
    from kobza.export.gguf import our_names
    from kobza.export.types import types_of
    from kobza.formats.gguf_families import config_to_gguf
    from kobza.formats.layouts import shapes
    from kobza.formats.weights import gguf_pieces

    config, found = loaded.run.model, matrices(loaded.model)
    arch, _ = config_to_gguf(config)
    ours = our_names(config, arch)
    pieces = gguf_pieces(config, arch, loaded.model.get_parameter, shapes(config))
    plan, _ = types_of(to).plan({piece.name: piece.shape for piece in pieces}, ours, weighed)
    return {name: plan[theirs] for theirs, names in ours.items() if theirs in plan for name in names if name in found}


def batches_of(texts: Sequence[str], loaded: Loaded, n_tokens: int) -> list[Tensor]:
    """Texts, without any the prose of the certificate -> sequences of ids, (B, T) each, together at most n_tokens; each begins as
    in training."""
    texts = texts or corpus_for(loaded.tokenizer, 0).prose
    device, start = next(loaded.model.parameters()).device, opening(loaded.tokenizer, needed=False)
    ids = np.concatenate([loaded.tokenizer.encode(text) for text in texts])[:n_tokens]
    require(len(ids) >= 2, f"the text is too short: {len(ids)} token(s); give at least 2")
    length = min(WINDOW, loaded.run.model.max_seq_len) - len(start)
    whole = len(ids) // length * length
    rows = torch.from_numpy(ids[:whole].astype(np.int64)).view(-1, length)
    rest = torch.from_numpy(ids[whole:].astype(np.int64))[None]
    parts = [*rows.split(max(1, WINDOW // length)), *([rest] if rest.shape[1] >= 2 else [])]
    begin = torch.tensor([start], dtype=torch.int64)
    return [torch.cat((begin.expand(len(part), -1), part), dim=1).to(device) for part in parts if len(part)]


def measured(
    loaded: Loaded,
    wanted: Types,
    batches: list[Tensor],
    max_kl: float | None,
    importance: Mapping[str, Tensor] | None = None,
    progress: Shown = lambda *_: None,
) -> tuple[dict[str, Any], Types]:
    """The report, and the types that it is of."""
    model, sizes = loaded.model, loaded.tokenizer.piece_bytes
    few = batches[0][: max(1, ALONE // batches[0].shape[1]), :ALONE]
    alone = sensitivities(model, wanted, few, importance, progress)
    reference, rounded = Reference(model, batches), Rounded(model, importance)
    types = wanted if max_kl is None else chosen(model, wanted, alone, max_kl, reference, rounded, sizes)
    overall = reference.damage(rounded.become(types), sizes)
    taken = {name: n_bytes(type, shape_of(model, name)) for name, type in types.items()}
    tensors = [{"name": name, "type": types[name], "kl": alone[name], "bytes": taken[name]} for name in types]
    rest = sum(4 * parameter.numel() for name, parameter in model.named_parameters() if name not in types)
    return {
        "tokens": overall.n_tokens,
        "overall": asdict(overall),
        "bytes_after": sum(taken.values()) + rest,
        "kept_wider": {name: type for name, type in types.items() if type != wanted[name]},
        "tensors": tensors,
    }, types


def chosen(
    model: GPT,
    wanted: Types,
    alone: Mapping[str, float],
    max_kl: float,
    reference: Reference,
    rounded: Rounded,
    sizes: np.ndarray,
) -> Types:
    """The types with which the whole stays below max_kl."""
    ladders = {name: ladder(type, shape_of(model, name)) for name, type in wanted.items()}
    return choose(ladders, alone, max_kl, lambda types: reference.damage(rounded.become(types), sizes).kl)


def plan_types(
    loaded: Loaded,
    to: str,
    max_kl: float,
    texts: Sequence[str],
    importance: Mapping[str, Tensor] | None = None,
    progress: Shown = lambda *_: None,
    n_tokens: int = 4096,
) -> Types:
    """For the exporter: {our weight's name: ggml type} of those kept wider, so that the whole stays below max_kl on the texts."""
    wanted, batches = ggml_types(loaded, to, importance is not None), batches_of(texts, loaded, n_tokens)
    head = {"embed.weight": importance["lm_head.weight"]} if importance and loaded.run.model.tied else {}
    report, _ = measured(loaded, wanted, batches, max_kl, {**(importance or {}), **head}, progress)
    return report["kept_wider"]


def shape_of(model: GPT, name: str) -> tuple[int, ...]:
    """The shape of a weight."""
    return tuple(model.get_parameter(name).shape)


def bytes_before(loaded: Loaded) -> int:
    """What the model takes on the disk; of a tuning, which has no such file, what its weights would."""
    file = loaded.folder / "model.safetensors"
    return file.stat().st_size if file.exists() else sum(4 * p.numel() for p in loaded.model.parameters())


# ---- what is said --------------------------------------------------------------------------------------------------


def tell(console: Console, report: dict[str, Any], run: Path, out: Path | None) -> None:
    """The report for a person."""
    say, overall, kept = console.print, report["overall"], report["kept_wider"]
    before, after = report["bytes_before"], report["bytes_after"]
    say(f"quantised     {escape(str(run))} to {report['to']}: {before / 1e6:,.1f} MB to {after / 1e6:,.1f} MB")
    say(f"measured on   {overall['n_tokens']:,} tokens of {report['text']}")
    say(f"KL            {overall['kl']:.3g} nats a token; 99 tokens in 100 below {overall['kl_99']:.3g}")
    say(f"bits per byte {overall['bits_per_byte']:.4f}, changed by {overall['bits_per_byte_change']:+.4f}")
    say(f"flipped       the likeliest token is another after {overall['flips']:.2%}\n")
    say(worst_table(report))
    if kept:
        say(
            f"kept wider    {len(kept)} of {len(report['tensors'])} weights, to stay within --max-kl {report['max_kl']:g}"
        )
    if out is not None:
        say(f"report        {escape(str(out / 'damage.html'))}", soft_wrap=True)
        say(f"next          kobza generate {escape(str(out))}", soft_wrap=True)
    elif report["to"] in OURS:
        say(f"next          kobza quantize {escape(str(run))} --to {report['to']} --out FOLDER", soft_wrap=True)
    else:
        say(f"next          kobza export {escape(str(run))} --to gguf --types {report['to']}", soft_wrap=True)


def worst_table(report: dict[str, Any]) -> Table:
    """The weights whose rounding costs most."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("weight", "KL alone", "kept in"):
        table.add_column(column, justify="right" if column == "KL alone" else "left", no_wrap=True)
    for tensor in sorted(report["tensors"], key=lambda tensor: -tensor["kl"])[:SHOWN]:
        table.add_row(tensor["name"], f"{tensor['kl']:.3g}", tensor["type"])
    return table
