"""Which weight is kept in which form: surgery by {weight's name: type}, and a twin of a model that shares what is not changed.

The types of our own runtime, narrow to wide: nf4 and int8 are packed layers; bf16 and float32 are plain weights, rounded and as
they were. ggml's types are for files that others read: here they are only rounded to, so that what they cost can be measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kobza.config import InputError, nearest, require
from kobza.layers import Embedding, Linear
from kobza.model import GPT
from kobza.quant.int8 import Embedding8bit, Linear8bit, dequantize_int8, quantize_int8
from kobza.quant.nf4 import Linear4bit, dequantize_nf4, quantize_nf4
from kobza.surgery import replace_modules

TYPES = ("nf4", "int8", "bf16", "float32")
PACKED = (Linear4bit, Linear8bit, Embedding8bit)


def matrices(model: nn.Module) -> dict[str, Any]:
    """The modules whose weights can be quantised, by the weights' names; a head that a table shares is not named twice."""
    found: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Linear, Embedding)):
            found.setdefault(id(module.weight), (f"{name}.weight", module))
    return dict(found.values())


def twin(model: GPT) -> GPT:
    """A model of its own modules and the same weights: surgery on it leaves the first as it is, and it takes no memory."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def set_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give a module another weight, and all that share the old one."""
    old, new = model.get_parameter(name), nn.Parameter(weight, requires_grad=False)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                setattr(module, key, new)


def quantise(model: GPT, types: Mapping[str, str]) -> GPT:
    """Keep weights in the types named, in place; those not named stay as they are. A tied head goes with its table.

    quantise(model, {"blocks.0.attn.q_proj.weight": "nf4", "embed.weight": "int8"})
    """
    found = matrices(model)
    for name, type in types.items():
        check(name, type, found)
        module = found.pop(name)  # so that each float weight goes when it is packed: never two models in memory
        if type in ("nf4", "int8"):
            put(model, name, packed_of(module, type))
        elif type == "bf16":
            set_weight(model, name, module.weight.detach().bfloat16().to(module.weight.dtype))
    return model


def check(name: str, type: Any, found: Mapping[str, nn.Module]) -> None:
    """Refuse a weight that is not there, and a type that it cannot have."""
    require(name in found, f"the model has no matrix {name!r}{nearest(name, list(found))}")
    require(
        type in TYPES,
        f"{name}: no type {type!r} here; it may be newer: pip install -U kobza{nearest(str(type), TYPES)}",
    )
    table = isinstance(found[name], Embedding)
    require(not (table and type == "nf4"), f"{name}: nf4 is for layers, and this is a table; take int8 or wider")


def packed_of(module: Any, type: str) -> nn.Module:
    """A layer or a table, packed."""
    if isinstance(module, Embedding):
        return Embedding8bit.of(module)
    return (Linear4bit if type == "nf4" else Linear8bit).of(module)


def put(model: GPT, name: str, module: nn.Module) -> None:
    """Put a packed module in its place, and where a head shares its table the head of the same codes."""
    places = {name.removesuffix(".weight"): module}
    if name == "embed.weight" and model.lm_head.weight is model.embed.weight:
        places["lm_head"] = Linear8bit(module.packed)
    for where, new in places.items():
        replace_modules(model, lambda at, _, where=where: at == where, lambda _, new=new: new)


@torch.no_grad()
def dequantise(model: GPT) -> GPT:
    """Make packed weights plain ones of the same numbers, in place."""
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, PACKED)]:
        if isinstance(module, Embedding8bit):
            plain: Any = Embedding(*module.packed.codes.shape, module.factor)
        else:
            plain = Linear(module.in_features, module.out_features, bias=False)
            plain.bias = module.bias
        tied = model.config.tied and name == "lm_head"  # its table has been made before it
        plain.weight = model.embed.weight if tied else nn.Parameter(module.weight)
        replace_modules(model, lambda at, _, name=name: at == name, lambda _, plain=plain: plain.train(model.training))
    return model


# ---- rounding ------------------------------------------------------------------------------------------------------


def round_weight(type: str, importance: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A float matrix -> the numbers that a type keeps of it, float32. importance (in,): what ggml's quantisers weigh with."""
    ours = {
        "nf4": lambda w: dequantize_nf4(quantize_nf4(w), tuple(w.shape), torch.float32),
        "int8": lambda w: dequantize_int8(quantize_int8(w)),
        "bf16": lambda w: w.bfloat16().float(),
        "float32": lambda w: w.float(),
    }
    return ours[type] if type in ours else ggml_rounding(type, importance)


def ggml_rounding(type: str, importance: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Rounding to one of ggml's types."""
    from kobza.formats.ggml import BLOCKS, dequantize, quantize

    if type not in BLOCKS:
        raise InputError(f"no type {type!r}{nearest(type, [*TYPES, *BLOCKS])}")
    more = {} if importance is None else {"importance": importance.numpy()}

    def rounded(weight: Tensor) -> Tensor:
        numbers = weight.float().cpu().numpy()
        return torch.from_numpy(dequantize(quantize(numbers, type, **more), type, numbers.shape)).to(weight.device)

    return rounded


def n_bytes(type: str, shape: tuple[int, ...]) -> int:
    """What a matrix of a shape takes in a type, in a file."""
    from kobza.formats.ggml import bytes_of

    n_out, n_in = shape
    n = n_out * n_in
    if type == "nf4":
        return -(-n // 2) + -(-n // 64) + 4 * -(-n // (64 * 256)) + 4
    if type == "int8":
        return n + 2 * n_out
    return bytes_of({"bf16": "BF16", "float32": "F32"}.get(type, type), shape)
