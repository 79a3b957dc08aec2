"""Checkpoints of the field's small trainers under our names: nanoGPT's ckpt.pt and llama2.c's .bin.

`read_nanogpt` goes through torch's own restricted reader (weights_only), which makes tensors and plain values and calls nothing;
the zip around it is looked at first, since a lying one can grow in memory. `read_llama2c` knows versions 0 (no magic), 1 and 2
(int8); the file must have the size that its header makes it, to the byte. Both give (config, tensors, dtype, kind, metadata);
tensors are mapped from the file and read as they are looked at.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kobza.config import InputError, ModelConfig, require
from kobza.formats.families import shown
from kobza.formats.layouts import GPT2, shapes, slots
from kobza.formats.weights import gathered, to_halves

SAFE_WAY = "load it where you trust it and save its state_dict with safetensors.torch.save_file"
MAX_PICKLE = 64 << 20  # bytes of data.pkl: names and shapes; a 1000-layer optimizer state takes about one
Read = tuple[ModelConfig, Mapping[str, Tensor], str, str, dict[str, Any]]


# ---- nanoGPT -------------------------------------------------------------------------------------------------------


def read_nanogpt(path: Path) -> Read:
    """nanoGPT's ckpt.pt: {"model_args": sizes, "model": tensors, ...}, weights (out, in), or (in, out) as GPT-2's own."""
    found = load_plain(path)
    sizes, state = found.get("model_args"), found.get("model")
    keys = ", ".join(repr(key)[:40] for key in list(found)[:5])
    good = isinstance(sizes, dict) and isinstance(state, dict)
    require(good, f"{path}: has {keys}; nanoGPT's ckpt.pt has model_args and model; for other trainers, {SAFE_WAY}")
    whole = all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items())
    require(whole, f"{path}: model holds more than named tensors; {SAFE_WAY}")
    # torch.compile puts its name before all; causal masks are no weights
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith(GPT2.ignored)}
    for name, tensor in state.items():
        plain = tensor.layout is torch.strided and tensor.dtype.is_floating_point and not tensor.is_meta
        require(
            plain, f"{path}: {shown(name)} is {tensor.dtype}, {tensor.layout}; kobza reads dense floating-point tensors"
        )
    once = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    claimed, size = sum(tensor.numel() * tensor.itemsize for tensor in once.values()), path.stat().st_size
    require(claimed <= size, f"{path}: its tensors claim {claimed:,} bytes in a file of {size:,}; refused as forged")
    embed, head = (state.get(name) for name in ("transformer.wte.weight", "lm_head.weight"))
    require(embed is not None, f"{path}: no transformer.wte.weight in model; for other trainers, {SAFE_WAY}")
    tied = head is None or (head.shape == embed.shape and torch.equal(head, embed))
    try:
        config = nanogpt_config(sizes, tied)
        fused = state.get("transformer.h.0.attn.c_attn.weight")
        conv1d = fused is not None and tuple(fused.shape) == (config.n_embd, 3 * config.n_embd)
        wanted = slots(config, replace(GPT2, conv1d=conv1d), "transformer.", state.keys())
        extra = sorted(state.keys() - {slot.theirs for slot in wanted} - {"lm_head.weight"})
        require(not extra, f"{len(extra)} tensors that nanoGPT has not, e.g. {', '.join(map(shown, extra[:3]))}")
        tensors = gathered(config, wanted, state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    plain = {name: value for name, value in found.items() if isinstance(value, int | float | str | bool)}
    metadata = {"model_args": sizes, "config": found.get("config", {})} | plain
    return config, tensors, str(embed.dtype).removeprefix("torch."), "nanogpt", metadata


def nanogpt_config(sizes: Mapping[str, Any], tied: bool = True) -> ModelConfig:
    """model_args -> ModelConfig: GPT-2 with the exact GELU, and without biases where bias is false."""
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        value = sizes.get(name)
        good = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
        require(good, f"model_args {name} is {value!r}; it must be a whole number above 0")
    bias = sizes.get("bias", True)  # the first checkpoints have no such setting, and biases
    require(isinstance(bias, bool), f"model_args bias is {bias!r}; it must be true or false")
    same = {name: sizes[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    switches = dict(position="learned", norm="layernorm", qk_norm=False, mlp="gelu", bias=bias, tied=tied)
    return ModelConfig(**same, max_seq_len=sizes["block_size"], **switches)


def load_plain(path: Path) -> dict[str, Any]:
    """What torch.save wrote, if it is a dict of tensors and plain values; nothing else is ever made of it."""
    check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol; what cannot be read is refused below
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([A-Za-z_][\w.]*)", str(error))
        what = f"asks for {named[1]}" if named else "asks for more than tensors and plain values"
        raise InputError(f"{path}: {what}, and a pickle can run code when read; {SAFE_WAY}") from None
    except Exception as error:  # noqa: BLE001  whatever a forged file makes the reader stumble over
        line = shown(" ".join(str(error).split()))
        raise InputError(
            f"{path}: not a whole torch file ({type(error).__name__}: {line}); download it again"
        ) from None
    require(isinstance(found, dict), f"{path}: holds a {type(found).__name__}; nanoGPT's ckpt.pt is a dict; {SAFE_WAY}")
    return found


def check_zip(path: Path) -> None:
    """Refuse a zip that grows when read: torch.save stores its records as they are, side by side."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"{path}: not a whole torch file ({shown(str(error))}); download it again") from None
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    require(packed is None, f"{path}: record {packed!r} is compressed, which torch.save never does; refused as forged")
    total, size = sum(entry.file_size for entry in entries), path.stat().st_size
    require(total <= size, f"{path}: its records claim {total:,} bytes in a file of {size:,}; refused as forged")
    for entry in entries:
        small = not entry.filename.endswith(".pkl") or entry.file_size <= MAX_PICKLE
        require(
            small,
            f"{path}: {shown(entry.filename)} has {entry.file_size:,} bytes; names and shapes take {MAX_PICKLE:,} at most",
        )


# ---- llama2.c ------------------------------------------------------------------------------------------------------

MAGIC = 0x616B3432  # "ak42"
KINDS = {  # their order of versions 1 and 2 -> the shape of one, as names of sizes; version 0 differs in order alone
    "attn_norm": ("dim",),
    "mlp_norm": ("dim",),
    "norm": ("dim",),
    "embed": ("vocab", "dim"),
    "attn.q_proj": ("dim", "dim"),
    "attn.k_proj": ("kv", "dim"),
    "attn.v_proj": ("kv", "dim"),
    "attn.o_proj": ("dim", "dim"),
    "mlp.gate_proj": ("ff", "dim"),
    "mlp.down_proj": ("dim", "ff"),
    "mlp.up_proj": ("ff", "dim"),
    "lm_head": ("vocab", "dim"),
}
ORDER_0 = (
    "embed",
    "attn_norm",
    "attn.q_proj",
    "attn.k_proj",
    "attn.v_proj",
    "attn.o_proj",
    "mlp_norm",
    "mlp.gate_proj",
)
ORDER_0 += ("mlp.down_proj", "mlp.up_proj", "norm", "angles", "lm_head")


class Bin(Mapping[str, Tensor]):
    """Tensors of a llama2.c file by our names: (offset of the numbers, of their scales or None) each, made when asked for."""

    def __init__(self, path: Path, config: ModelConfig, group: int = 0):
        self.bytes = np.memmap(path, np.uint8, "r")
        self.config, self.table, self.group = config, shapes(config), group
        self.places: dict[str, tuple[int, int | None]] = {}

    def __getitem__(self, name: str) -> Tensor:
        start, scales = self.places[name]
        shape = self.table[name]
        n = int(np.prod(shape))
        if scales is None:
            numbers = self.bytes[start : start + 4 * n].view("<f4")
        else:
            groups = self.bytes[start : start + n].view(np.int8).reshape(-1, self.group)
            scale = self.bytes[scales : scales + 4 * len(groups)].view("<f4")
            numbers = groups * scale[:, None]
        tensor = torch.from_numpy(np.array(numbers, dtype=np.float32)).view(shape)
        heads = {"q_proj": self.config.n_head, "k_proj": self.config.n_kv_head}.get(name.split(".")[-2], 0)
        return to_halves(tensor, heads) if heads else tensor  # its rope turns neighbouring channels

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_llama2c(path: Path) -> Read:
    """A .bin of llama2.c."""
    with path.open("rb") as file:
        head = file.read(256)
    magic = len(head) == 256 and struct.unpack_from("<I", head)[0] == MAGIC
    version, at = (struct.unpack_from("<i", head, 4)[0], 8) if magic else (0, 0)
    require(version in (0, 1, 2), f"{path}: llama2.c version {version}; kobza reads 0, 1 and 2")
    require(len(head) >= 28, f"{path}: {len(head)} bytes, less than a header of llama2.c; download it again")
    dim, ff, n_layer, n_head, n_kv_head, vocab, length = struct.unpack_from("<7i", head, at)
    tied = vocab > 0 if version == 0 else head[at + 28] == 1
    group = struct.unpack_from("<i", head, at + 29)[0] if version == 2 else 0
    sizes = dict(dim=dim, hidden_dim=ff, n_layers=n_layer, n_heads=n_head, n_kv_heads=n_kv_head, vocab_size=abs(vocab))
    sizes |= {"seq_len": length}
    bad = next((f"{name} {value}" for name, value in sizes.items() if not 0 < value < 2**31), None)
    what = "neither a GGUF, a torch file nor one of llama2.c"
    require(bad is None, f"{path}: {what}: read as a header, it has {bad}")
    try:
        config = ModelConfig(
            vocab_size=abs(vocab), max_seq_len=length, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=dim, n_ff=ff,
            qk_norm=False, mlp="swiglu", tied=tied,
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"{path}: {what}: read as a header, {error}") from None
    spans, end = places(config, version, group)
    size = path.stat().st_size
    require(size == end, f"{path}: {size:,} bytes, and as a llama2.c file of its header it would have {end:,}")
    tensors = Bin(path, config, group)
    tensors.places = spans
    dtype = "int8" if version == 2 else "float32"
    return config, tensors, dtype, "llama2c", {"version": version, "group_size": group} | sizes


def places(config: ModelConfig, version: int, group: int) -> tuple[dict[str, tuple[int, int | None]], int]:
    """Where each weight begins, and its scales in version 2, which all stand at the end; and the size of the file."""
    kv = config.n_kv_head * config.head_dim
    sizes = {"dim": config.n_embd, "kv": kv, "ff": config.n_ff, "vocab": config.vocab_size}
    found: dict[str, tuple[int, int | None]] = {}
    quantised: list[tuple[str, int]] = []
    at = 256 if version else 28
    for kind in KINDS if version else ORDER_0:
        if kind == "angles":  # cos and sin, which the numbers say
            at += 4 * config.max_seq_len * config.head_dim
            continue
        if kind == "lm_head" and config.tied:
            continue
        shape = KINDS[kind]
        n = int(np.prod([sizes[name] for name in shape], dtype=object))
        small = version == 2 and len(shape) == 2
        good = not small or (group > 0 and n % group == 0)
        require(good, f"a llama2.c group of {group} numbers does not divide {kind}, which has {n:,}")
        single = kind in ("embed", "norm", "lm_head")
        for name in (f"{kind}.weight",) if single else (f"blocks.{i}.{kind}.weight" for i in range(config.n_layer)):
            found[name] = (at, None)
            quantised += [(name, n // group)] if small else []
            at += n if small else 4 * n
    for name, n_groups in quantised:
        found[name] = (found[name][0], at)
        at += 4 * n_groups
    return found, at
