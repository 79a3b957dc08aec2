"""A model of other people's, by its path: `load_model(path) -> Foreign(model, config, ...)`, a GPT with float32 weights.

A Hugging Face folder, a .gguf file, nanoGPT's ckpt.pt or llama2.c's .bin. What is in a file is told by its first bytes, not by
its name. Names and shapes are held against the config before memory is asked for; then the weights come tensor by tensor, so the
peak is the float32 model and one tensor more. No repository code is run and nothing unpickled but tensors and plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kobza.config import InputError, ModelConfig, require
from kobza.formats.families import config_from_hf, layout_of, shown
from kobza.formats.gguf_families import config_from_gguf
from kobza.formats.headers import TensorInfo, find_tensors, inside, read_json
from kobza.formats.layouts import (
    Layout,
    Slot,
    head_names,
    is_linear_bias,
    layout_by_names,
    prefix_of,
    shapes,
    slots,
)
from kobza.formats.weights import Shape, check_slots, taken
from kobza.model import GPT

ANGLE_BYTES = (
    2**31
)  # of the rotary tables, cos and sin of every position, which no file has to back; 1M x 128 takes half of it
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
RELEASED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Foreign:
    """A model from elsewhere, ready to use: `model` in eval mode with float32 weights."""

    model: GPT
    config: ModelConfig
    dtype: str
    """of most weights as released: float32, bfloat16, ... or a GGUF type, Q4_1"""
    kind: Literal["hf", "gguf", "nanogpt", "llama2c"]
    metadata: dict[str, Any]
    """config.json, the GGUF's metadata, or the trainer's own settings"""


def load_model(path: Path) -> Foreign:
    """The model in a Hugging Face folder, a .gguf file, a nanoGPT checkpoint or a llama2.c file."""
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    require(
        path.is_file(), f"{path}: no such file or folder; name a Hugging Face folder, a .gguf, ckpt.pt or .bin file"
    )
    from kobza.formats import small  # after the dispatch above: most loads need neither of its formats

    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return _from_gguf(path)
    if start[:2] == b"PK":  # a zip, which torch.save writes
        return Foreign(*_filled_plain(path, *small.read_nanogpt(path)))
    pickled = start[:1] == b"\x80"
    require(not pickled, f"{path}: an old pickle, which can run code when read; {small.SAFE_WAY}")
    require(path.suffix == ".bin", f"{path}: begins with {start!r}; neither a GGUF nor a torch file; name one of those")
    return Foreign(*_filled_plain(path, *small.read_llama2c(path)))


def _filled_plain(
    path: Path, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: str, kind: Any, metadata: dict[str, Any]
) -> tuple[GPT, ModelConfig, str, Any, dict[str, Any]]:
    """A reader of small.py gives our names already."""
    wanted = [Slot(name, (name,)) for name in shapes(config)]
    stored = {name: tuple(tensors[name].shape) for name in tensors}
    return fill(path, config, wanted, stored, tensors.__getitem__), config, dtype, kind, metadata


def fill(
    path: Path, config: ModelConfig, wanted: list[Slot], stored: Mapping[str, Shape], read: Callable[[str], Tensor]
) -> GPT:
    """A GPT with its weights read one by one."""
    table = shapes(config)
    try:
        check_slots(table, wanted, stored)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    angles = 8 * config.max_seq_len * config.head_dim // 2 if config.position == "rope" else 0
    far = f"a context of {config.max_seq_len:,} needs {angles / 2**30:.1f} GiB of angles; lower it in the config"
    require(angles <= ANGLE_BYTES, f"{path}: {far}")
    try:
        model = GPT(config).eval()  # torch.empty: pages are taken as they are filled
    except RuntimeError:  # torch's allocator
        gib = 4 * sum(math.prod(shape) for shape in table.values()) / 2**30
        raise InputError(f"{path}: the weights need {gib:.1f} GiB in float32, more than there is") from None
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for slot in wanted:
            for name, part in taken(table, slot, read(slot.theirs)):
                parameters.pop(name).copy_(part)
        for name in [name for name in parameters if is_linear_bias(name)]:  # left out of the file
            parameters.pop(name).zero_()
    assert not parameters, f"never filled: {list(parameters)}"
    return model


# ---- Hugging Face --------------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Foreign:
    there = (folder / "config.json").exists()
    require(there, f"{folder}: no config.json; name a Hugging Face folder, or the .gguf, ckpt.pt or .bin file in it")
    hf = read_json(inside(folder, "config.json"))
    try:
        config = config_from_hf(hf)
    except InputError as error:
        raise InputError(f"{folder}/{error}") from None
    infos = find_tensors(folder)
    layout = layout_by_names(config, infos.keys())
    try:
        prefix = prefix_of(layout, infos.keys())
        wanted = slots(config, layout, prefix, infos.keys())
        check_rest(layout, wanted, infos.keys(), config, prefix, multimodal="text_config" in hf)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    for slot in wanted:
        path, info = infos.get(slot.theirs, (folder, None))
        good = info is None or info.dtype in DTYPES
        what = f"{slot.theirs} is {info and info.dtype}; kobza reads {', '.join(DTYPES)}, not quantised weights"
        require(good, f"{path}: {what}")
    stored = {name: info.shape for name, (_, info) in infos.items()}
    head = next((name for name in head_names(layout, prefix) if name in infos), None) if config.tied else None
    if head:
        embed = wanted[0].theirs
        alike = stored[head] == stored[embed] and infos[head][1].dtype == infos[embed][1].dtype
        same = alike and torch.equal(read_tensor(*infos[head]), read_tensor(*infos[embed]))
        tie = "tie_word_embeddings is true (or absent), which drops it; set it to false"
        require(same, f"{folder}: {head} is another tensor than {embed}, and {tie}")
    model = fill(folder, config, wanted, stored, lambda name: read_tensor(*infos[name]))
    return Foreign(model, config, RELEASED[most(infos[slot.theirs][1] for slot in wanted)], "hf", hf)


def most(infos: Iterator[TensorInfo]) -> str:
    """The dtype of most bytes."""
    sizes: dict[str, int] = {}
    for info in infos:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.end - info.start
    return max(sizes, key=lambda name: sizes[name])


def read_tensor(path: Path, info: TensorInfo) -> Tensor:
    """A tensor of a safetensors file, its bytes mapped: they are read as they are looked at."""
    n_bytes = info.end - info.start
    if n_bytes == 0:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    try:
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=info.end)  # never written back
    except RuntimeError as error:
        raise InputError(f"{path}: cannot be mapped: {str(error).splitlines()[0]}") from None
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)[info.start : info.end]
    # torch views bytes as wider numbers only where they are aligned; headers usually are, and one tensor may be copied
    aligned = info.start % DTYPES[info.dtype].itemsize == 0
    return (raw if aligned else raw.clone()).view(DTYPES[info.dtype]).view(info.shape)


def check_rest(
    layout: Layout,
    wanted: list[Slot],
    names: Collection[str],
    config: ModelConfig,
    prefix: str,
    multimodal: bool = False,
) -> None:
    """Refuse a file with weights that the config does not speak of: they would be dropped in silence."""
    used = {slot.theirs for slot in wanted} | (set(head_names(layout, prefix)) if config.tied else set())
    rest = [name for name in names if name not in used and not name.endswith(layout.ignored)]
    if multimodal:  # of other senses, which the text alone does not need
        rest = [name for name in rest if name.startswith(prefix)]
    some = ", ".join(map(shown, rest[:3]))
    what = f"{len(rest)} tensors that the config does not speak of ({some})"
    require(not rest, f"{what}; dropping them would change the model")
    head = "lm_head" in {name.rpartition(".")[0] for slot in wanted for name in slot.ours}
    lost = head and not any(name in names for name in head_names(layout, prefix))
    tie = "tie_word_embeddings is false or absent; set it to true if the head is the embedding"
    require(not lost, f"no {layout.head}.weight in the file, and {tie}")


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path) -> Foreign:
    from kobza.formats.ggml import load_tensor
    from kobza.formats.gguf import read_gguf

    file = read_gguf(path)
    stored = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    freqs = "rope_freqs.weight"
    try:
        slowed = None
        if freqs in stored:
            n = math.prod(stored[freqs])
            require(n <= 4096, f"{freqs} has {n:,} values, more than half of any head")
            slowed = [float(value) for value in load_tensor(file, freqs).ravel()]
        config = config_from_gguf(file.metadata, stored, slowed)
        layout = layout_of(file.metadata["general.architecture"], gguf=True)
        wanted = slots(config, layout, names=stored.keys())
        check_rest(layout, wanted, stored.keys(), config, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None

    def read(name: str) -> Tensor:
        return torch.from_numpy(load_tensor(file, name))

    model = fill(path, config, wanted, stored, read)
    sizes: dict[str, int] = {}
    for slot in wanted:
        tensor = file.tensors[slot.theirs]
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.n_bytes
    return Foreign(model, config, max(sizes, key=lambda name: sizes[name]), "gguf", file.metadata)
