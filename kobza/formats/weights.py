"""Weights between other people's files and ours, along the slots of layouts.py: split, transpose, permute, shift, and back.

All work in whatever dtype comes in; views where nothing has to be reordered. Gradients go the same way as weights (but for the
shift of norms, which a gradient does not have). load.py streams the same steps into a model tensor by tensor, and out of one a
`Piece` is made when it is asked for, so that a file of any size takes the memory of its largest tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kobza.config import ModelConfig, require
from kobza.formats.families import config_from_hf, family_of, layout_of, text_part
from kobza.formats.gguf_families import gguf_target, llama3_slowdown
from kobza.formats.layouts import Layout, Slot, is_linear_bias, layout_by_names, prefix_of, shapes, slots

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]


class Piece(NamedTuple):
    """A tensor of a file to be, made when it is asked for."""

    name: str
    shape: Shape
    make: Callable[[], Tensor]


def from_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face file under our names; each of ours is given, of our shape."""
    layout = layout_by_names(config, tensors.keys())
    return gathered(config, slots(config, layout, prefix_of(layout, tensors.keys()), tensors.keys()), tensors)


def from_gguf(config: ModelConfig, arch: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The (dequantised) tensors of a GGUF file under our names."""
    return gathered(config, slots(config, layout_of(arch, gguf=True), names=tensors.keys()), tensors)


def to_hf(config: ModelConfig, hf_config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as the file that `config_to_hf(config)` describes."""
    return {p.name: p.make() for p in hf_pieces(config, hf_config, tensors.__getitem__, tensors)}


def to_gguf(config: ModelConfig, arch: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names and in the order of a GGUF file, matrices (out, in) as in numpy."""
    return {p.name: p.make() for p in gguf_pieces(config, arch, tensors.__getitem__, tensors)}


def hf_pieces(config: ModelConfig, hf_config: Mapping[str, Any], read: Read, names: Collection[str]) -> Iterator[Piece]:
    """The tensors of the file that `config_to_hf(config)` describes, in its order. read: a weight of ours by a name of `names`.

    Rows of padding are cut off; weights that theirs has and ours has not are filled with what changes nothing."""
    return _pieces(config, config_from_hf(hf_config), family_of(text_part(hf_config))[1].layout, read, names)


def gguf_pieces(config: ModelConfig, arch: str, read: Read, names: Collection[str]) -> Iterator[Piece]:
    """The tensors of a GGUF file in its order, likewise; at the end Llama 3's divisors of the rotary frequencies."""
    yield from _pieces(config, gguf_target(config, arch), layout_of(arch, gguf=True), read, names)
    if config.rope_scaling == "llama3":
        slowed = llama3_slowdown(config)
        yield Piece("rope_freqs.weight", (len(slowed),), lambda: torch.tensor(slowed, dtype=torch.float32))


def _pieces(
    config: ModelConfig, target: ModelConfig, layout: Layout, read: Read, names: Collection[str]
) -> Iterator[Piece]:
    """Our weights in the slots of a target that computes the same."""
    bare = layout.loose and not (config.bias or config.qkv_bias)
    wanted = [slot for slot in slots(target, layout) if not (bare and is_linear_bias(slot.ours[0]))]
    lost = set(names) - {name for slot in wanted for name in slot.ours}
    lost = {name for name in lost if not name.startswith("ahead.")}  # heads of training
    require(not lost, f"no place for {', '.join(sorted(lost)[:3])} in the other format")
    table = shapes(target)
    for slot in wanted:
        yield Piece(slot.theirs, stored_shape(table, slot), partial(_made, slot, config, target, table, read, names))


def _made(
    slot: Slot, config: ModelConfig, target: ModelConfig, sizes: Mapping[str, Shape], read: Read, names: Collection[str]
) -> Tensor:
    """A slot filled with ours; a head that is tied in ours and not in theirs is the table."""

    def part(name: str) -> Tensor:
        source = "embed.weight" if name == "lm_head.weight" and config.tied else name
        if source in names:
            return read(source)[: sizes[name][0]]
        return neutral(name, sizes[name], target, read("embed.weight"))

    stored = slot.ours[0] in names and slot.ours[0].endswith("norm.weight")
    offset = float(config.norm_offset) - float(target.norm_offset) if stored else 0.0
    return joined(slot._replace(shift=slot.shift + offset), [part(name) for name in slot.ours])


def neutral(name: str, shape: Shape, target: ModelConfig, like: Tensor) -> Tensor:
    """The weight that changes nothing: 1 in a norm (0 where the norm adds 1 itself), 0 in a bias."""
    is_gain = name.endswith("norm.weight")
    require(is_gain or name.endswith(".bias"), f"the weights have no {name}")
    return like.new_full(shape, float(is_gain and not target.norm_offset))


def gathered(config: ModelConfig, wanted: list[Slot], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of ours out of the slots; biases that the file leaves out are 0."""
    table, infos = shapes(config), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_slots(table, wanted, infos)
    found = {name: part for slot in wanted for name, part in taken(table, slot, tensors[slot.theirs])}
    some = found["embed.weight"]
    left_out = [name for name in table if name not in found and is_linear_bias(name)]
    return found | {name: neutral(name, table[name], config, some) for name in left_out}


def check_slots(table: Mapping[str, Shape], wanted: list[Slot], stored: Mapping[str, Shape]) -> None:
    """Refuse a file in which a tensor is missing or of another shape than the config makes it, before anything is loaded."""
    for slot in wanted:
        theirs, shape = slot.theirs, stored_shape(table, slot)
        require(theirs in stored, f"tensor {theirs} is not among the file's {len(stored)}; the config asks for it")
        require(
            stored[theirs] == shape, f"tensor {theirs} is {list(stored[theirs])}; the config makes it {list(shape)}"
        )


def stored_shape(table: Mapping[str, Shape], slot: Slot) -> Shape:
    """The shape in the file of what a slot holds."""
    parts = [table[name] for name in slot.ours]
    shape: Shape = (sum(part[0] for part in parts), *parts[0][1:])
    return tuple(reversed(shape)) if slot.transposed else shape


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
    if slot.shift:  # 1 + w keeps few bits of w in half precision
        tensor = (tensor if tensor.dtype == torch.float64 else tensor.float()) + slot.shift
    return tensor.T.contiguous() if slot.transposed else tensor.contiguous()


def to_halves(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of q or k, (H D, ...), from neighbouring pairs (0 1)(2 3).. in each head to halves: 0 2 4 .. 1 3 5 .."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
