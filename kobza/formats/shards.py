"""safetensors files written tensor by tensor: what is in memory is one of them. https://github.com/huggingface/safetensors"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kobza.config import InputError, require
from kobza.formats.weights import Piece

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHARD = 5_000_000_000  # bytes; the size that `transformers` shards at
Progress = Callable[[str, int, int], None]


def write_shards(
    folder: Path, pieces: Sequence[Piece], dtype: torch.dtype, progress: Progress | None = None, shard: int = SHARD
) -> None:
    """The tensors as model.safetensors, or as several files and their index where they are more than a shard.
    progress(tensor, bytes written, bytes in all)"""
    groups = split(pieces, dtype, shard)
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    total = sum(n_bytes(piece, dtype) for piece in pieces)
    done = 0

    def told(name: str, n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(name, done, total)

    for name, group in zip(names, groups, strict=True):
        write_safetensors(folder / name, group, dtype, told)
    if len(groups) > 1:
        where = {piece.name: name for name, group in zip(names, groups, strict=True) for piece in group}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def split(pieces: Sequence[Piece], dtype: torch.dtype, most: int) -> list[list[Piece]]:
    """Consecutive tensors in groups of at most so many bytes; a larger one stands alone."""
    groups: list[list[Piece]] = [[]]
    room = most
    for piece in pieces:
        size = n_bytes(piece, dtype)
        if size > room and groups[-1]:
            groups.append([])
            room = most
        groups[-1].append(piece)
        room -= size
    return groups


def n_bytes(piece: Piece, dtype: torch.dtype) -> int:
    """Of a tensor in a file."""
    return math.prod(piece.shape) * dtype.itemsize


def write_safetensors(
    path: Path, pieces: Sequence[Piece], dtype: torch.dtype, told: Callable[[str, int], None] = lambda name, n: None
) -> None:
    """One file. The header says beforehand where each tensor will lie; told(tensor, its bytes) after each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in pieces:
        stop = start + n_bytes(piece, dtype)
        header[piece.name] = {"dtype": NAMES[dtype], "shape": list(piece.shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that the tensors are aligned
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for piece in pieces:
            file.write(raw_bytes(piece, dtype))
            told(piece.name, n_bytes(piece, dtype))


def raw_bytes(piece: Piece, dtype: torch.dtype) -> memoryview:
    """The tensor's numbers in a dtype, little endian as on every machine that torch runs on."""
    made = piece.make()
    assert tuple(made.shape) == piece.shape, f"{piece.name} is {tuple(made.shape)}, promised {piece.shape}"
    tensor = made.to(dtype).contiguous()
    if not tensor.numel():
        return memoryview(b"")
    if not all(math.isfinite(edge) for edge in torch.aminmax(tensor)):  # one pass, and no copy as isfinite makes
        large = max(abs(float(edge)) for edge in torch.aminmax(made))
        whole = f"{piece.name}: a weight is infinite or no number; export a checkpoint that is whole"
        require(math.isfinite(large), whole)
        raise InputError(
            f"{piece.name}: a weight of {large:g} is more than {NAMES[dtype]} holds; take bfloat16 or float32"
        )
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
