"""The tensors of a model by name, from its files alone, and what its modules put out for a prompt.

parts.py counts what a config says; here is what is really there: the number format of each tensor, which weights are tied, which
tensors are buffers. A model of others is read by its own headers, under our names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import ModelConfig, require
from kobza.formats.families import config_from_hf, layout_of
from kobza.formats.gguf import read_gguf
from kobza.formats.gguf_families import config_from_gguf
from kobza.formats.headers import find_tensors, inside, read_json
from kobza.formats.layouts import layout_by_names, prefix_of, slots
from kobza.model import GPT
from kobza.surgery import find_modules, watch

SHOWN = 4  # first values of an activation
BLOCK = re.compile(r"blocks\.(\d+)")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Row:
    """A tensor of a model: where, of what, how large."""

    name: str
    module: str
    shape: list[int]
    dtype: str
    parameters: int
    """0 for a buffer, and for a weight that is another's"""
    note: str
    """ "", "= embed.weight" for a tied weight, "buffer" """


@dataclass(frozen=True)
class Activation:
    """What a module put out: figures of all its numbers, `max` of their sizes, `values` the first of the last token's."""

    name: str
    shape: list[int]
    mean: float
    std: float
    rms: float
    max: float
    values: list[float]


# ---- the tree ------------------------------------------------------------------------------------------------------


def folder_formats(folder: Path) -> tuple[ModelConfig, dict[str, str]]:
    """The config of a folder in the Hugging Face layout, and our names of its weights with their formats."""
    config, infos = config_from_hf(read_json(inside(folder, "config.json"))), find_tensors(folder)
    layout = layout_by_names(config, infos.keys())
    places = slots(config, layout, prefix_of(layout, infos.keys()), infos.keys())
    formats = {name: info.dtype for name, (_, info) in infos.items()}
    return config, {ours: formats[slot.theirs] for slot in places if slot.theirs in formats for ours in slot.ours}


def gguf_formats(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    """The same of a .gguf: Q4_1 and the like."""
    file = read_gguf(path)
    config = config_from_gguf(file.metadata, {name: tuple(tensor.shape) for name, tensor in file.tensors.items()})
    places = slots(config, layout_of(file.metadata["general.architecture"], gguf=True))
    formats = {name: tensor.type for name, tensor in file.tensors.items()}
    return config, {ours: formats[slot.theirs] for slot in places if slot.theirs in formats for ours in slot.ours}


def rows_of(model: nn.Module, stored: dict[str, str], otherwise: str) -> list[Row]:
    """A row a weight and buffer, in the model's order; `stored` are formats on disk by name, `otherwise` that of the rest."""
    first: dict[int, str] = {}
    rows = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        for leaf, weight in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            owner = first.setdefault(id(weight), full)
            dtype = DTYPES.get(stored.get(owner, ""), stored.get(owner, otherwise))
            tied = "" if owner == full else f"= {owner}"
            rows.append(Row(full, kind, list(weight.shape), dtype, 0 if tied else weight.numel(), tied))
        for leaf, buffer in module.named_buffers(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            rows.append(Row(full, kind, list(buffer.shape), str(buffer.dtype).removeprefix("torch."), 0, "buffer"))
    return rows


def folded(rows: list[Row]) -> list[Row]:
    """The rows with neighbouring blocks that are alike as one: blocks.0-29.attn.q_proj.weight, their parameters summed."""
    parts = [(key, list(group)) for key, group in groupby(rows, lambda row: block_of(row.name))]
    result: list[Row] = []
    for _, group in groupby(parts, lambda part: part[0] if part[0] is None else alike(part[1])):
        same = list(group)
        first, last, n = same[0][0], same[-1][0], len(same)
        for row in same[0][1]:
            name = row.name if n == 1 else row.name.replace(f"blocks.{first}.", f"blocks.{first}-{last}.", 1)
            note = row.note if n == 1 else f"{row.note} x {n}".strip()
            result.append(Row(name, row.module, row.shape, row.dtype, n * row.parameters, note))
    return result


def block_of(name: str) -> int | None:
    """block_of("blocks.3.attn.q_proj.weight") -> 3; None outside the blocks."""
    found = BLOCK.match(name)
    return None if found is None else int(found[1])


def alike(rows: list[Row]) -> tuple[Any, ...]:
    """What two blocks have in common when they are alike."""
    return tuple((BLOCK.sub("", row.name), row.module, tuple(row.shape), row.dtype, row.note) for row in rows)


# ---- activations ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def activations(model: GPT, ids: list[int], pattern: str) -> list[Activation]:
    """What the modules of a pattern put out for the ids, in the order in which they ran."""
    size = model.config.max_seq_len
    require(len(ids) <= size, f"the prompt has {len(ids):,} tokens and the context is {size:,}; shorten it")
    wanted = find_modules(model, pattern, "--layer")
    seen: list[Activation] = []

    def see(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(measured(name, output))

    def match(name: str, module: nn.Module) -> bool:
        return name in wanted and not isinstance(module, nn.Identity)  # a norm that the model has not

    with watch(model, match, see):
        model(torch.tensor([ids]))
    require(
        bool(seen),
        f"--layer {pattern}: these modules put out no tensor of their own; name one inside, as blocks.0.attn",
    )
    return seen


def measured(name: str, output: Tensor) -> Activation:
    """The figures of a module's output."""
    x = output.float()
    first = x.reshape(-1, x.shape[-1])[-1, :SHOWN].tolist()
    mean, rms = x.mean().item(), x.square().mean().sqrt().item()
    return Activation(name, list(x.shape), mean, x.std(correction=0).item(), rms, x.abs().max().item(), first)
