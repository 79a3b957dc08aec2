"""Low-rank adapters on a built model: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024).

    lora    y = W x + s B A x                           s = alpha / r; rsLoRA: alpha / sqrt(r)
    dora    y = m (W + s B A) x / |W + s B A|           a length m a row of W, |.| over each row, taken as a constant

A is drawn and B zero, so a fresh adapter changes nothing, to the bit. `add_lora` wraps the linear layers that the method names
and freezes the rest; `freeze_base` keeps what is frozen in the dtype it is used in; merge.py undoes the wrapping, peft.py writes
and reads the files. W is of a float Linear or of a quantised one: all that is asked of it is `weight`, `bias` and its two widths.

Shapes: W (out, in), A (r, in), B (out, r), m (out,). Factors are float32 and used in the dtype of what flows in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import nearest, require
from kobza.finetune.config import MethodConfig
from kobza.layers import widen
from kobza.model import GPT
from kobza.surgery import Float32, replace_modules

TABLES = ("embed", "lm_head")


@runtime_checkable
class Projection(Protocol):
    """A linear layer, quantised or not. It has `weight` (out, in) and `bias` besides: to look for them here would make them."""

    in_features: int
    out_features: int


class LoraLinear(nn.Module):
    """A linear layer with an adapter beside it. (..., in) -> (..., out)."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float, dora: bool):
        super().__init__()
        self.base, self.scale, self.on = base, scale, True
        self.in_features, self.out_features = base.in_features, base.out_features
        weight = base.weight.detach()
        factors = {"dtype": torch.float32, "device": weight.device}
        self.lora_a = nn.Parameter(torch.zeros(rank, base.in_features, **factors))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **factors))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.magnitude = nn.Parameter(row_lengths(weight)) if dora else None
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.on:
            return y
        a, b = self.lora_a.to(x.dtype), self.lora_b.to(x.dtype)
        change = F.linear(F.linear(self.dropout(x), a) * self.scale, b)  # scaled where it is narrow
        if self.magnitude is None:
            return y + change
        gain = (self.magnitude / row_lengths(self.adapted(self.base.weight.to(x.dtype)))).to(x.dtype)  # (out,)
        product = y if self.base.bias is None else y - self.base.bias.to(x.dtype)
        return y + (gain - 1) * product + gain * change  # in this order: a gain of 1 leaves y's bits

    @torch.no_grad()
    def adapted(self, weight: Tensor) -> Tensor:
        """W + s B A, (out, in), float32 or wider."""
        wide = widen(weight)
        return wide + self.scale * (self.lora_b.to(wide.dtype) @ self.lora_a.to(wide.dtype))


def row_lengths(weight: Tensor) -> Tensor:
    """Length of each row, (out, in) -> (out,), float32 or wider; of a row of zeros not quite 0, by which nothing is divided."""
    return torch.linalg.vector_norm(widen(weight), dim=1).clamp(min=1e-12)  # as torch's own normalize


# ---- what learns ---------------------------------------------------------------------------------------------------


def choose_weights(model: GPT, method: MethodConfig, seed: int) -> list[str]:
    """Let learn what the method says, freeze the rest -> the names of the weights that learn."""
    if method.method == "lora":
        add_lora(model, method, seed)
    elif method.method == "full":
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        learn_tables(model)
    return list(adapter_tensors(model))


def learn_tables(model: GPT) -> None:
    """Let the token table and the head learn."""
    for name in TABLES:
        model.get_submodule(name).requires_grad_(True)


def add_lora(model: GPT, method: MethodConfig, seed: int) -> list[str]:
    """Put adapters on the method's targets, freeze all else but its tables -> the modules wrapped.

    add_lora(model, MethodConfig(targets="q_proj,v_proj"), 0) -> ["blocks.0.attn.q_proj", "blocks.0.attn.v_proj", ...]
    """
    names = targets_of(model, method.targets)
    if "lm_head" in names:
        tied = model.config.tied
        require(
            not tied, "--targets: lm_head is tied: the head is the token table, which would change too; leave it out"
        )
        require(not method.embeddings, "--embeddings learns lm_head whole; leave lm_head out of --targets")
    for name in names:
        n_out, n_in = model.get_submodule(name).out_features, model.get_submodule(name).in_features
        too_wide = f"--rank is {method.rank} and {name} is {n_in} -> {n_out}; take {min(n_in, n_out)} or less"
        require(method.rank <= min(n_in, n_out), too_wide)
    scale = method.alpha / (method.rank**0.5 if method.rslora else method.rank)
    wrap(model, dict.fromkeys(names, (method.rank, scale)), method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapters(model).values():
            bound = module.in_features**-0.5  # kaiming-uniform with a = sqrt(5), as PEFT draws
            module.lora_a.copy_(torch.empty(module.lora_a.shape).uniform_(-bound, bound, generator=generator))
    return names


def wrap(model: GPT, sizes: Mapping[str, tuple[int, float]], method: MethodConfig) -> None:
    """Put zero adapters of (rank, scale) on modules by name, freeze all else but the method's tables."""
    require(not adapters(model), "the model has an adapter already; merge it first: kobza merge")
    model.requires_grad_(False)
    of = {id(model.get_submodule(name)): size for name, size in sizes.items()}
    dropout, dora = method.dropout, method.dora
    replace_modules(model, lambda _, m: id(m) in of, lambda m: LoraLinear(m, *of[id(m)], dropout, dora))
    if method.embeddings:
        learn_tables(model)


def targets_of(model: GPT, patterns: str) -> list[str]:
    """The linear layers of the blocks and the head that patterns name, in the model's order; one that names none is refused.
    "q_proj" is a leaf's name, "blocks.0.*" a whole one's."""
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Projection) and name.startswith(("blocks.", "lm_head")) and not name.endswith(".base")
    ]
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    found: set[str] = set()
    for pattern in (word.strip() for word in patterns.split(",")):
        require(bool(pattern), f"--targets {patterns!r} has an empty pattern; name modules with commas between them")
        matching = {n for n in linear if fnmatchcase(n if "." in pattern else n.rpartition(".")[2], pattern)}
        if not matching:
            near = nearest(pattern, linear if "." in pattern else leaves)
            require(False, f"--targets {pattern!r} matches no linear module{near}; there are {', '.join(leaves)}")
        found |= matching
    return [name for name in linear if name in found]


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The wrapped layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What learns, by name: "blocks.0.attn.q_proj.lora_a", "embed.weight", ..."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fill_adapter(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put back what `adapter_tensors` gave; every difference in names and shapes is told, both ways."""
    wanted = adapter_tensors(model)
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} where the model wants {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    require(not problems, f"{where}: adapter and method differ: {'; '.join(problems[:6])} ({len(problems)} in all)")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


# ---- the base ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def freeze_base(model: GPT, dtype: torch.dtype) -> list[str]:
    """Store frozen linear layers, and a frozen token table, in the dtype they are computed in -> the weights' names.

    No number changes: each use casts them so anyway. The table stays wide where a position is added to it before the cast, and
    so does what surgery.compute_in_float32 has taken (call that first).
    """
    wide = [name for name, module in model.named_modules() if any(map(is_wide, module._forward_pre_hooks.values()))]
    wide += [] if model.position is None else ["embed", *(["lm_head"] if model.config.tied else [])]
    kept = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or module is model.embed:
            if any(f"{name}.".startswith(f"{other}.") for other in wide):
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
                    kept.append(f"{name}.{leaf}")
    return [name for name, _ in model.named_parameters() if name in kept]  # a tied weight once


def is_wide(hook: object) -> bool:
    """Whether a hook is that of surgery.compute_in_float32."""
    return isinstance(getattr(hook, "__self__", None), Float32)


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context the model is its base: the reference of DPO."""
    found = adapters(model)
    changed = next((name for name in adapter_tensors(model) if name.rpartition(".")[0] not in found), "")
    remedy = "take --method lora without --embeddings, or give a reference of its own"
    require(not changed, f"{changed} learns, so the model without its adapter is not its base; {remedy}")
    before = {name: module.on for name, module in found.items()}
    for module in found.values():
        module.on = False
    try:
        yield
    finally:
        for name, module in found.items():
            module.on = before[name]
