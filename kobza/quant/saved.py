"""A quantised model's checkpoint: the packed tensors as they lie in memory, beside the usual config and tokenizer.

    quantised.safetensors     blocks.0.attn.q_proj.codes  .scale  ...; any other weight by its own name, in bf16 where exact
    config.json               provenance: {"quantised": {"blocks.0.attn.q_proj.weight": "int8", ...}, "quantised_format": 1}
    tokenizer.json  manifest.json

The file has a name of its own, so that nobody takes packed tensors for plain weights, an older kobza neither: that finds no
model.safetensors and says so. A model opened again computes what it did before, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kobza.checkpoint import FORMAT, Loaded, fill_model, load_tensors, model_tensors, read_config, verify, write_folder
from kobza.config import require, to_dict
from kobza.layers import Embedding
from kobza.model import GPT
from kobza.quant.forms import PACKED, check, matrices, put
from kobza.quant.int8 import Embedding8bit, Linear8bit, Rows8
from kobza.quant.nf4 import BLOCK, SCALE_BLOCK, Linear4bit, Quantized
from kobza.tokenizer import load_tokenizer

FILE = "quantised.safetensors"
VERSION = 1  # of what FILE holds


def save_quantised(
    folder: Path, model: GPT, loaded: Loaded, types: Mapping[str, str], extra: Mapping[str, str]
) -> None:
    """Write what `quantise(model, types)` made of a loaded model as a checkpoint folder; `extra` {file name: text} beside it."""
    provenance = loaded.provenance | {"quantised": dict(types), "quantised_format": VERSION}

    def fill(aside: Path) -> None:
        save_file(dict(tensors_of(model)), aside / FILE)
        config = {"format": FORMAT, **to_dict(loaded.run), "provenance": provenance}
        (aside / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        loaded.tokenizer.save(aside / "tokenizer.json")
        for name, text in extra.items():
            (aside / name).write_text(text, encoding="utf-8")

    write_folder(folder, fill)


def tensors_of(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """What FILE holds of a model: the parts of packed weights, and the rest in bf16 where nothing is lost by it."""
    for name, module in model.named_modules():
        if isinstance(module, PACKED) and not (name == "lm_head" and model.config.tied):
            yield from ((f"{name}.{part}", tensor.cpu()) for part, tensor in module.packed._asdict().items())
    for name, tensor in model_tensors(model).items():
        if tensor.numel():  # the mark in a packed table has none
            narrow = tensor.bfloat16()
            yield name, narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def open_quantised(folder: Path, device: torch.device | str = "cpu", unknown: str | None = None) -> Loaded:
    """The model of a checkpoint that `save_quantised` wrote, its weights packed."""
    verify(folder, FILE)
    run, provenance = read_config(folder / "config.json")
    version, types = provenance.get("quantised_format"), provenance.get("quantised")
    newer = f"{folder}: quantised format {version!r} and this kobza reads {VERSION}; install a newer one: pip install -U kobza"
    require(version == VERSION, newer)
    require(isinstance(types, dict), f"{folder}/config.json: it does not say what is quantised; quantise again")
    tokenizer = load_tokenizer(folder / "tokenizer.json", unknown or run.data.unknown)
    tensors = load_tensors(folder / FILE)
    model = GPT(run.model).eval()  # GPT draws nothing, and memory that is not written costs none
    found = matrices(model)
    for name, type in types.items():
        check(name, type, found)
        if type in ("nf4", "int8"):
            put(model, name, unpacked(tensors, name, type, found[name], folder))
    fill_model(model, tensors | marks(model), str(folder / FILE))
    return Loaded(model.to(device), run, tokenizer, provenance, folder)


def unpacked(tensors: dict[str, Tensor], name: str, type: str, module: nn.Module, folder: Path) -> nn.Module:
    """The packed layer or table in place of a module, its parts taken out of a file's tensors."""
    if type == "nf4":
        packed = blocks4(tensors, name, module, folder)
        return Linear4bit(packed, tuple(module.weight.shape), module.bias)
    rows = rows8(tensors, name, module, folder)
    return Embedding8bit(rows, module.scale) if isinstance(module, Embedding) else Linear8bit(rows, module.bias)


def marks(model: GPT) -> dict[str, Tensor]:
    """The weights without numbers, which no file holds."""
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.numel()}


def rows8(tensors: dict[str, Tensor], name: str, module: nn.Module, folder: Path) -> Rows8:
    """Take the parts of a weight in 8 bits out of a file's tensors."""
    n_out, n_in = module.weight.shape
    wanted = {"codes": (torch.int8, (n_out, n_in)), "scale": (torch.bfloat16, (n_out,))}
    return Rows8(**taken(tensors, name, wanted, folder))


def blocks4(tensors: dict[str, Tensor], name: str, module: nn.Module, folder: Path) -> Quantized:
    """Take the parts of a weight in 4 bits out of a file's tensors."""
    n = module.weight.numel()
    n_blocks = -(-n // BLOCK)
    wanted = {"codes": (torch.uint8, (-(-n // 2),)), "scale_codes": (torch.uint8, (n_blocks,))}
    wanted |= {"scale_scales": (torch.float32, (-(-n_blocks // SCALE_BLOCK),)), "offset": (torch.float32, ())}
    return Quantized(**taken(tensors, name, wanted, folder))


def taken(
    tensors: dict[str, Tensor], name: str, wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]], folder: Path
) -> dict[str, Tensor]:
    """The parts of a packed weight, each of the type and shape that the config makes it, its scales finite."""
    parts = {}
    for part, (dtype, shape) in wanted.items():
        key = name.removesuffix("weight") + part
        again = f"{folder / FILE}: {key} is"
        require(key in tensors, f"{folder / FILE}: {key} is missing; quantise again")
        tensor = tensors.pop(key)
        found, want = f"{tensor.dtype} {tuple(tensor.shape)}", f"{dtype} {shape}"
        require(found == want, f"{again} {found} where the config wants {want}; quantise again")
        require(bool(tensor.float().isfinite().all()), f"{again} not finite; quantise again")
        parts[part] = tensor
    return parts
