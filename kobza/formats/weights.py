"""Weights between other people's files and ours, along the slots of families.py: split, transpose, permute, shift, and back.

All work in whatever dtype comes in; views where nothing has to be reordered. Gradients go the same way as weights (but for the
shift of Gemma's norms in GGUF, which a gradient does not have). load.py streams the same steps into a model tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kobza.config import ModelConfig, require
from kobza.formats.families import (
    Slot,
    config_from_hf,
    family_of,
    layout_by_names,
    layout_of,
    prefix_of,
    shapes,
    slots,
    text_part,
)

Shape = tuple[int, ...]


def from_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face file under our names; each of ours is given, of our shape."""
    layout = layout_by_names(config, tensors.keys())
    return gathered(config, slots(config, layout, prefix_of(layout, tensors.keys()), tensors.keys()), tensors)


def from_gguf(config: ModelConfig, arch: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The (dequantised) tensors of a GGUF file under our names."""
    return gathered(config, slots(config, layout_of(arch, gguf=True)), tensors)


def to_hf(config: ModelConfig, hf_config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as the file that `config_to_hf(config)` describes. Rows of padding are cut off; weights that theirs has and
    ours has not are filled with what changes nothing."""
    text = text_part(hf_config)
    layout, target = family_of(text)[1].layout, config_from_hf(hf_config)
    return put(config, target, slots(target, layout), tensors)


def to_gguf(config: ModelConfig, arch: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names and in the order of a GGUF file, matrices (out, in) as in numpy."""
    return put(config, config, slots(config, layout_of(arch, gguf=True)), tensors)


def put(
    config: ModelConfig, target: ModelConfig, wanted: list[Slot], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our tensors in the slots of a target that computes the same."""
    sizes, found = shapes(target), {}
    some = next(iter(tensors.values()))
    for slot in wanted:
        parts = [tensors[n] if n in tensors else neutral(n, sizes[n], target, some) for n in slot.ours]
        cut = [part[: sizes[name][0]] for name, part in zip(slot.ours, parts, strict=True)]
        found[slot.theirs] = joined(slot, cut)
    lost = set(tensors) - {name for slot in wanted for name in slot.ours}
    lost = {name for name in lost if not name.startswith("ahead.")}  # heads of training
    require(not lost, f"no place for {', '.join(sorted(lost)[:3])} in the other format")
    return found


def neutral(name: str, shape: Shape, target: ModelConfig, like: Tensor) -> Tensor:
    """The weight that changes nothing: 1 in a norm (0 where the norm adds 1 itself), 0 in a bias."""
    is_gain = name.endswith("norm.weight")
    require(is_gain or name.endswith(".bias"), f"the weights have no {name}")
    return like.new_full(shape, float(is_gain and not target.norm_offset))


def gathered(config: ModelConfig, wanted: list[Slot], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of ours out of the slots."""
    table, infos = shapes(config), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_slots(table, wanted, infos)
    return {name: part for slot in wanted for name, part in taken(table, slot, tensors[slot.theirs])}


def check_slots(table: Mapping[str, Shape], wanted: list[Slot], stored: Mapping[str, Shape]) -> None:
    """Refuse a file in which a tensor is missing or of another shape than the config makes it, before anything is loaded."""
    for slot in wanted:
        theirs = slot.theirs
        require(theirs in stored, f"tensor {theirs} is not among the file's {len(stored)}; the config asks for it")
        parts = [table[name] for name in slot.ours]
        shape: Shape = (sum(part[0] for part in parts), *parts[0][1:])
        shape = tuple(reversed(shape)) if slot.transposed else shape
        require(
            stored[theirs] == shape, f"tensor {theirs} is {list(stored[theirs])}; the config makes it {list(shape)}"
        )


def taken(table: Mapping[str, Shape], slot: Slot, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of each part of a slot that has been checked."""
    tensor = tensor.T if slot.transposed else tensor
    tensor = tensor - slot.shift if slot.shift else tensor
    tensor = to_halves(tensor, slot.n_heads) if slot.n_heads else tensor
    yield from zip(slot.ours, tensor.split([table[name][0] for name in slot.ours]), strict=True)


def joined(slot: Slot, parts: list[Tensor]) -> Tensor:
    """Ours as theirs: the inverse of `taken`."""
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    tensor = to_pairs(tensor, slot.n_heads) if slot.n_heads else tensor
    tensor = tensor + slot.shift if slot.shift else tensor
    return tensor.T.contiguous() if slot.transposed else tensor.contiguous()


def to_halves(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k, (H D, ...), from neighbouring pairs (0 1)(2 3).. in each head to halves: 0 2 4 .. 1 3 5 .."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
