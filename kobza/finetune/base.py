"""A base's weights, read tensor by tensor into the dtype in which they are kept: memory holds them once.

`load_checkpoint` draws random weights and then holds the file beside the model; here no number is drawn and the file is read
piece by piece with plain reads, since pages of a mapped file count as the process' own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from kobza.checkpoint import Loaded, find_checkpoint, model_tensors, read_config, verify
from kobza.config import InputError, ModelConfig, require
from kobza.formats.headers import TensorInfo, read_header
from kobza.model import GPT
from kobza.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PIECE = 1 << 20  # bytes read at a time


def load_base(
    path: Path,
    dtype: torch.dtype = torch.float32,
    wide_tables: bool = False,
    n_layer: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Loaded:
    """The model behind a run or a checkpoint folder as `load_checkpoint` gives it, its matrices kept in `dtype`; n_layer: only
    its first blocks; tokenizer: where it is at hand."""
    folder = find_checkpoint(path)
    verify(folder)
    run, provenance = read_config(folder / "config.json")
    if n_layer:
        run = replace(run, model=first_blocks(run.model, n_layer))
    tokenizer = tokenizer or load_tokenizer(folder / "tokenizer.json", run.data.unknown)
    model = read_model(folder / "model.safetensors", run.model, dtype, wide_tables)
    return Loaded(model, run, tokenizer, provenance, folder)


@torch.no_grad()
def read_model(path: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, wide_tables: bool = False) -> GPT:
    """The model of a config with the weights of a safetensors file, in eval mode.

    Linear layers and tables are kept in `dtype`, all else in float32, where the tables too stay if they are to learn
    (wide_tables), or are added to a table of positions before anything is cast.
    """
    model = GPT(config).eval()  # GPT draws nothing, and memory that is not written costs none
    header = {name: info for name, info in read_header(path).items() if within(name, config.n_layer)}
    check_same(model, header, path)
    narrow = [module for module in model.modules() if isinstance(module, nn.Linear)] + [model.embed]
    kept = {id(parameter) for module in narrow for parameter in module.parameters(recurse=False)}
    if wide_tables or model.position is not None:
        kept.discard(id(model.embed.weight))
    if wide_tables:
        kept.discard(id(model.lm_head.weight))
    buffer = torch.empty(PIECE, dtype=torch.uint8)  # one for all: a fresh one each would leave pages behind
    with path.open("rb") as file:
        for name, parameter in model.named_parameters():
            if id(parameter) in kept:
                parameter.data = torch.empty(parameter.shape, dtype=dtype)
            read_into(parameter.data.view(-1), file, header[name], buffer, path)
    return model


def first_blocks(config: ModelConfig, n: int) -> ModelConfig:
    """The config of a model's first n blocks, as wide as they are there."""
    widths = config.ff_widths.split(",")[: n * config.pattern.count("F")]
    omitted = [part for part in config.omit_heads.split() if int(part.split(":")[0]) < n * config.pattern.count("A")]
    return replace(config, n_layer=n, ff_widths=",".join(widths), omit_heads=" ".join(omitted))


def within(name: str, n_layer: int) -> bool:
    """Whether a weight is outside the blocks or in one of the first n_layer. within("blocks.3.attn.q_proj.weight", 2) -> False"""
    words = name.split(".")
    return words[0] != "blocks" or not words[1].isdecimal() or int(words[1]) < n_layer


def check_same(model: GPT, header: dict[str, TensorInfo], path: Path) -> None:
    """Refuse a file whose names, shapes or dtypes are not the model's; every difference is named, both ways."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    problems = [f"missing {name}" for name in wanted if name not in header]
    problems += [f"unexpected {name}" for name in header if name not in wanted]
    problems += [
        f"{name} is {header[name].dtype} {header[name].shape} where the config wants {shape} of {', '.join(DTYPES)}"
        for name, shape in wanted.items()
        if name in header and (header[name].shape != shape or header[name].dtype not in DTYPES)
    ]
    require(not problems, f"{path}: weights and config differ: {'; '.join(problems[:8])} ({len(problems)} in all)")


def read_into(flat: Tensor, file: BinaryIO, info: TensorInfo, buffer: Tensor, path: Path) -> None:
    """Fill a flat tensor with the numbers of a tensor in a file, cast piece by piece as the buffer (bytes) takes them."""
    dtype = DTYPES[info.dtype]
    file.seek(info.start)
    for piece in flat.split(len(buffer) // dtype.itemsize):
        raw = buffer[: piece.numel() * dtype.itemsize]
        if file.readinto(memoryview(raw.numpy())) != raw.numel():
            raise InputError(f"{path}: it ended early; it changed while it was read, try again")
        piece.copy_(raw.view(dtype))
