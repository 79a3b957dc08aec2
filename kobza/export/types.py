"""Which ggml type each tensor of a GGUF file gets: llama.cpp's mixtures by llama.cpp's names, after its src/llama-quant.cpp.

A file's type says what most of its matrices are. Vectors, norms and learned positions stay F32; the head, or the embedding that
is the head too, is kept wider; the _M mixtures keep the values of attention and the way out of the feed-forward wider in the
first and last eighth of the layers and in every third between. A row that is no whole number of blocks takes the type of nearly
the same bits whose block is smaller, else F16, and it is said.

    types_of("q4_k").plan({"token_embd.weight": (512, 256), ...}) -> ({"token_embd.weight": "Q6_K", ...}, [notes])
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kobza.config import nearest, require
from kobza.formats.ggml import BLOCKS

FILE_TYPES = {  # llama.h, enum llama_ftype
    **{"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_0": 2, "Q4_1": 3},
    **{"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18},
}
SHORT = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
FLOATS = ("F32", "F16", "BF16")
SMALLER_BLOCK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
GGML_TYPES = (*FLOATS, "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", *SMALLER_BLOCK)
"""what a tensor can be written in"""
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Types:
    """The types of a file: a name of FILE_TYPES, and the tensors that are kept in another."""

    name: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    """our tensor's name -> ggml type, whatever the mixture says"""

    def __post_init__(self) -> None:
        known = list(FILE_TYPES)
        require(self.name in known, f"no such GGUF type: {self.name}{nearest(self.name, known)}; known: {_list(known)}")
        for name, type in self.overrides.items():
            said = f"{name}: no ggml type {type} can be written{nearest(type, list(GGML_TYPES))}"
            require(type in GGML_TYPES, f"{said}; known: {_list(GGML_TYPES)}")

    @property
    def base(self) -> str:
        """The ggml type of most matrices: Q4_K of Q4_K_M."""
        return re.sub(r"(_K)_[SM]$", r"\1", self.name)

    @property
    def number(self) -> int:
        """general.file_type"""
        return FILE_TYPES[self.name]

    def plan(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        ours: Mapping[str, tuple[str, ...]] | None = None,
        with_importance: bool = False,
    ) -> tuple[dict[str, str], list[str]]:
        """The ggml type of each tensor of a file, and what a person should know of it.

        shapes: by GGUF name, the whole file's; ours: our names of what a tensor is made of, for the overrides
        """
        layers = [int(found[1]) for name in shapes if (found := LAYER.fullmatch(name))]
        n_layer, tied = max(layers, default=-1) + 1, "output.weight" not in shapes
        types: dict[str, str] = {}
        fallen: dict[tuple[str, str], list[str]] = {}
        for name, shape in shapes.items():
            wanted = self.of(name, shape, n_layer, tied, with_importance)
            kept = {self.overrides[part] for part in (ours or {}).get(name, ()) if part in self.overrides}
            wanted = max(kept, key=_bits) if kept else wanted  # joined tensors have one type, the widest asked for
            types[name] = fitted(wanted, shape)
            if types[name] != wanted:
                fallen.setdefault((wanted, types[name]), []).append(name)
        return types, [_note(*pair, names, shapes) for pair, names in fallen.items()]

    def of(
        self, name: str, shape: tuple[int, ...], n_layer: int, tied: bool = False, with_importance: bool = False
    ) -> str:
        """The ggml type that llama.cpp takes for a tensor, before its rows are looked at."""
        matrix = len(shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight")
        if not matrix or name == "position_embd.weight":
            return "F32"
        base = self.base
        if base in FLOATS:
            return base
        if name == "output.weight" or tied and name == "token_embd.weight":
            return "Q8_0" if base == "Q8_0" or shape[-1] % BLOCKS[base][0] else "Q6_K"
        found = LAYER.fullmatch(name)
        return self._mixed(int(found[1]), found[2], n_layer, with_importance) if found else base

    def _mixed(self, layer: int, part: str, n_layer: int, with_importance: bool) -> str:
        """A matrix of a block."""
        values, down = part in ("attn_v", "attn_qkv"), part == "ffn_down"
        eighth = n_layer // 8
        if self.name in SHORT.values() and (values or down):
            some = layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2
            return "Q6_K" if some else self.base
        if self.name == "Q4_K_S" and (values and layer < 4 or down and layer < eighth):
            return "Q5_K"
        if self.name in ("Q4_0", "Q5_0") and down and layer < eighth and with_importance:
            return self.name.replace("_0", "_1")  # importance can make the first layers' scales run wild
        return self.base


def types_of(name: str) -> Types:
    """The types by a name in any case; Q4_K and Q5_K are their medium mixtures."""
    upper = name.upper()
    return Types(SHORT.get(upper, upper))


def fitted(type: str, shape: tuple[int, ...]) -> str:
    """The type, or what takes its place where a row is no whole number of its blocks."""
    for fits in (type, SMALLER_BLOCK.get(type, "F16")):
        if shape[-1] % BLOCKS[fits][0] == 0:
            return fits
    return "F16"


def _bits(type: str) -> float:
    values, size = BLOCKS[type]
    return 8 * size / values


def _note(wanted: str, got: str, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    some = names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"
    widths = ", ".join(f"{width:,}" for width in sorted({shapes[name][-1] for name in names}))
    return f"{some}: rows of {widths} values are no multiple of {wanted}'s {BLOCKS[wanted][0]}, so {got} in its place"


def _list(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names)
