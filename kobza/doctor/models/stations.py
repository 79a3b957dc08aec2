"""The places of a network where two implementations can be held against each other, and a run that is forced at each of them.

A station is a point every decoder passes: the stream that enters the first block, what each sub-layer reads and writes, the
stream after each block, what the head reads, the logits. They are found by the structure of the modules alone, so that a kobza
model, one of `transformers` and a user's own meet at the same names:

    embed  blocks.0.attn.in  blocks.0.attn  blocks.0.mlp.in  blocks.0.mlp  blocks.0  ...  norm  logits

A forced run puts given values in the place of what was computed, at every station. What each stretch between two stations then
computes depends on nothing that went wrong before it: an error upstream neither hides one downstream nor causes it.

Shapes: B batch, T tokens, C width of the stream, V vocabulary. A station has (B, T, C), the logits (B, T, V).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import require
from kobza.model import GPT

Values = dict[str, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast-bf16": torch.float32}


@dataclass(frozen=True)
class Place:
    """Where a model is tapped: its blocks in order, the sub-layers of each by our names, and the head."""

    blocks: tuple[nn.Module, ...]
    parts: tuple[tuple[tuple[str, nn.Module], ...], ...]
    head: nn.Module | None

    @property
    def stations(self) -> list[str]:
        """Their names in the order of execution."""
        names = ["embed"]
        for index, parts in enumerate(self.parts):
            for part, _ in parts:
                names += [f"blocks.{index}.{part}.in", f"blocks.{index}.{part}"]
            names.append(f"blocks.{index}")
        return [*names, "norm", "logits"] if self.head is not None else [*names, "logits"]


def kind(station: str) -> str:
    """What is computed on the way to a station: "embed", "in", "attn", "mlp", "stream", "norm" or "logits"."""
    if station.endswith(".in"):
        return "in"
    if station.startswith("blocks."):
        leaf = station.split(".")[-1].rstrip("0123456789")
        return leaf or "stream"
    return station


def place(model: nn.Module) -> Place:
    """The blocks: the list of modules of one class with the most weights in it. Its sub-layers: children with a matrix."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and len({type(x) for x in m}) == 1]
    sized = [(sum(p.numel() for p in m.parameters()), len(m), m) for m in lists]
    blocks = max(sized, key=lambda row: row[:2], default=(0, 0, ()))[2]
    require(
        len(blocks) > 0,
        f"{type(model).__name__} has no list of blocks (torch.nn.ModuleList); its layers cannot be compared",
    )
    parts = tuple(tuple(_parts(block)) for block in blocks)
    return Place(tuple(blocks), parts, _head(model))


def _parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a block that hold matrices, named attn, mlp, attn2, ..."""
    seen: dict[str, int] = {}
    for name, child in block.named_children():
        if any(parameter.ndim > 1 for parameter in child.parameters()):
            word = "attn" if "att" in name.lower() or "att" in type(child).__name__.lower() else "mlp"
            seen[word] = seen.get(word, 0) + 1
            yield word + (str(seen[word]) if seen[word] > 1 else ""), child


def _head(model: nn.Module) -> nn.Module | None:
    """The matrix that makes logits, a module of its own."""
    named = dict(model.named_modules())
    return next((named[name] for name in ("lm_head", "head", "output", "embed_out") if name in named), None)


def prefix(model: nn.Module, n_blocks: int) -> nn.Module:
    """A copy with the first blocks only. The rest is not copied on the way: it may not fit."""
    blocks = place(model).blocks
    holder = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == len(blocks) and m[0] is blocks[0]
    )
    whole = dict(holder.named_children())
    try:
        for name in list(whole)[n_blocks:]:
            del holder._modules[name]
        copied = copy.deepcopy(model)
    finally:
        holder._modules.clear()
        holder._modules.update(whole)
    if isinstance(copied, GPT):
        copied.config = replace(copied.config, n_layer=n_blocks)
    elif isinstance(getattr(getattr(copied, "config", None), "num_hidden_layers", None), int):
        copied.config.num_hidden_layers = n_blocks  # GPT-2's n_layer is another name of it
    return copied


def matched(a: Place, b: Place) -> tuple[Place, Place]:
    """Both with the stations that they share: sub-layers only where every block has the same ones."""
    require(
        len(a.blocks) == len(b.blocks),
        f"the models have {len(a.blocks)} and {len(b.blocks)} blocks; compare models of one depth",
    )
    same = all([n for n, _ in x] == [n for n, _ in y] for x, y in zip(a.parts, b.parts, strict=True))
    heads = a.head is not None and b.head is not None
    return tuple(  # type: ignore[return-value]
        Place(p.blocks, p.parts if same else ((),) * len(p.blocks), p.head if heads else None) for p in (a, b)
    )


class Stop(Exception):
    """Raised inside a forward once the station that was asked for has been seen."""


class Tap:
    """Sees every station of a run. `forced`: values that take the place of the computed ones. `stop`: the last station wanted.
    `learns`: gradients are wanted at the stations."""

    def __init__(self, forced: Mapping[str, Tensor] | None = None, stop: str = "", learns: bool = False):
        self.forced, self.stop, self.learns = forced, stop, learns
        self.values: Values = {}  # as computed
        self.leaves: Values = {}  # as put in their place

    def see(self, name: str, value: Tensor) -> Tensor:
        """Note a value and return what flows on."""
        self.values[name] = value
        if name == self.stop:
            raise Stop
        if self.forced is None:
            if self.learns and not value.requires_grad:
                value.requires_grad_()
            return value
        given = self.forced[name]
        require(
            given.shape == value.shape,
            f"{name} is {tuple(value.shape)} in one model and {tuple(given.shape)} in the other; compare equal sizes",
        )
        put = given.detach().to(value.dtype)
        if self.learns:
            put = put.clone().requires_grad_()
        self.leaves[name] = put
        return put

    def reading(self, name: str) -> Callable[..., Any]:
        """A pre-hook: what a module reads is a station."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args and isinstance(args[0], Tensor):
                return (self.see(name, args[0]), *args[1:]), kwargs
            key = next(key for key in ("hidden_states", "x", "input", *kwargs) if isinstance(kwargs.get(key), Tensor))
            return args, kwargs | {key: self.see(name, kwargs[key])}

        return hook

    def writing(self, name: str) -> Callable[..., Any]:
        """A hook: what a module writes is a station."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.see(name, output[0]), *output[1:])
            return self.see(name, output)

        return hook

    @contextmanager
    def on(self, where: Place) -> Iterator[None]:
        """The hooks, gone afterwards."""
        hooks = [where.blocks[0].register_forward_pre_hook(self.reading("embed"), with_kwargs=True)]
        for index, (block, parts) in enumerate(zip(where.blocks, where.parts, strict=True)):
            for part, module in parts:
                name = f"blocks.{index}.{part}"
                hooks.append(module.register_forward_pre_hook(self.reading(f"{name}.in"), with_kwargs=True))
                hooks.append(module.register_forward_hook(self.writing(name)))
            hooks.append(block.register_forward_hook(self.writing(f"blocks.{index}")))
        if where.head is not None:
            hooks.append(where.head.register_forward_pre_hook(self.reading("norm"), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def call(model: nn.Module, ids: Tensor, positions: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Logits of a kobza model, one of `transformers`, or a module of ids. ids (B, T) -> (B, T, V)."""
    if isinstance(model, GPT):
        return model(ids, positions, dtype=dtype)
    takes = inspect.signature(model.forward).parameters
    more: dict[str, Any] = {}
    if (
        positions is not None
    ):  # all of the mask is given: without it, places not from 0 would be taken for a packed batch
        more = {"position_ids": positions[None], "attention_mask": torch.ones_like(ids)}
    more["use_cache"] = False
    if "targets" in takes and "labels" not in takes:
        more["targets"] = ids  # nanoGPT gives the last position's logits alone without
    output = model(ids, **{name: value for name, value in more.items() if name in takes})
    return output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits


@dataclass(frozen=True)
class Input:
    """What is run: ids (B, T), their places (None: from 0), the kind of arithmetic, and the logits that are compared (0: all; a
    vocabulary may be padded)."""

    ids: Tensor
    positions: Tensor | None = None
    dtype: str = "fp32"
    n_logits: int = 0


def run(model: nn.Module, where: Place, what: Input, tap: Tap) -> Values:
    """One forward with a tap -> the values at the stations, as computed."""
    auto = what.dtype == "autocast-bf16"
    with tap.on(where), torch.autocast("cpu", torch.bfloat16, enabled=auto), torch.set_grad_enabled(tap.learns):
        try:
            half = torch.bfloat16 if what.dtype == "bf16" else None
            tap.values["logits"] = call(model, what.ids, what.positions, half)[..., : what.n_logits or None]
        except Stop:
            pass
    return tap.values


def gradients(model: nn.Module, where: Place, what: Input, weights: bool = False) -> tuple[Values, Values, Values]:
    """A free run with the loss of the next token -> values, the loss's gradient at each station and, if asked, of each weight."""
    tap = Tap(learns=True)
    with trainable(model):
        values = run(model, where, what, tap)
        loss = F.cross_entropy(values["logits"][:, :-1].flatten(0, 1).double(), what.ids[:, 1:].flatten())
        return _detached(values), *_grads(loss, values, model if weights else None)


def forced_gradients(model: nn.Module, where: Place, what: Input, forced: Values, pull: Values) -> Values:
    """A forced run -> what flows back to each station over one stretch alone when `pull`, the gradient at its end, is sent in."""
    tap = Tap(forced, learns=True)
    with trainable(model):
        values = run(model, where, what, tap)
        total = sum((values[name] * pull[name].to(values[name].dtype)).sum().double() for name in values)
        return _grads(total, tap.leaves, None)[0]


def _detached(values: Values) -> Values:
    return {name: value.detach() for name, value in values.items()}


def _grads(loss: Tensor, at: Values, model: nn.Module | None) -> tuple[Values, Values]:
    """Gradients at stations and of the model's weights; 0 of a weight that learns nothing."""
    weights = dict(model.named_parameters()) if model else {}
    names, tensors = list(at) + list(weights), [*at.values(), *weights.values()]
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    grads = {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
    return {n: grads[n] for n in at if n in grads}, {n: grads.get(n, torch.zeros_like(w)) for n, w in weights.items()}


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Every weight takes a gradient within the context."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy, in eval mode, with its weights in dtype. Buffers stay as they are: tables of angles are float32 in every precision,
    and a model that is loaded in bf16 keeps them so. A kobza model keeps its weights, rounded, in float32, and is told at each
    call to compute in bf16: that is how it runs. Nothing is copied where nothing would change."""
    if not model.training and all(p.dtype == dtype for p in model.parameters() if p.is_floating_point()):
        return model
    model = copy.deepcopy(model).eval()
    stays = isinstance(model, GPT) and dtype == torch.bfloat16
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype).float() if stays else parameter.data.to(dtype)
                setattr(module, name, parameter)
    return model


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """A copy of the model as it computes in "fp32", "bf16" or (float32 weights) "autocast-bf16"."""
    return cast(model, DTYPES[dtype])


def distance(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|, L2 over all; inf where something is not finite. distance(1.1 y, y) -> 0.1"""
    x, y = x.double(), y.double()
    gap, size = (x - y).norm(), y.norm()
    value = float(gap / size) if size > 0 else float(gap)
    return value if value == value else float("inf")
