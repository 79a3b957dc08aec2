"""A linear layer of frozen weights with a LoRA adapter, as one node. For any device; its backward is derived by hand.

    h = x A^T        y = x W^T + bias + s h B^T
    t = g B          dx = g W + s t A        dA = s t^T x        dB = s g^T h        g = dL/dy

Kept: x and h (r numbers a token); W is asked of its layer again in the backward, so a quantised one is never kept dequantised.
Scale and add, which the plain form does in passes of their own over (N, out), ride in the last product, forward and backward.
There is no Triton here on purpose: all that is left are matrix products, and the maker's are the fastest to be had.
Plain twin: `forward` of the LoRA module itself.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LoraModule(Protocol):
    """What is asked of a layer with an adapter (kobza.finetune has one; rooms do not import each other)."""

    base: nn.Module  # has weight (out, in), which may be made at each asking, and bias
    lora_a: Tensor  # (r, in)
    lora_b: Tensor  # (out, r)
    scale: float
    dropout: nn.Module
    magnitude: Tensor | None  # DoRA's; such a layer is left to itself
    on: bool


def is_lora(module: object) -> bool:
    """Whether a module is a LoraModule. Not by isinstance: from Python 3.12 on that overlooks a Module's parameters."""
    return all(hasattr(module, name) for name in LoraModule.__annotations__)


def is_plain_lora(module: LoraModule) -> bool:
    """Whether `lora_linear` computes what the module would now: no DoRA, no dropout at work, a base that only stands there."""
    base = module.base
    watched = base._forward_hooks or base._forward_pre_hooks
    drops = module.dropout.training and getattr(module.dropout, "p", 0.0) > 0
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    return module.on and module.magnitude is None and frozen and not (drops or watched)


def lora_linear(x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T in the dtype of x, W and bias those of base. x (..., in), a (r, in), b (out, r)."""
    return LoraFunction.apply(x, base, a, b, scale)


class LoraFunction(torch.autograd.Function):
    """The autograd node of `lora_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> Tensor:
        bias = None if base.bias is None else base.bias.to(x.dtype)
        y = F.linear(x, base.weight.to(x.dtype), bias)
        h = F.linear(x, a.to(x.dtype)).flatten(0, -2)  # (N, r)
        y.view(-1, y.shape[-1]).addmm_(h, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, h, a, b)
        ctx.base, ctx.scale = base, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        g = g.reshape(-1, g.shape[-1])
        t = g @ b.to(g.dtype)  # (N, r)
        da = db = dx = None
        if ctx.needs_input_grad[2]:
            da = (t.t() @ x.reshape(-1, x.shape[-1])).to(a.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[3]:
            db = (g.t() @ h).to(b.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = (g @ ctx.base.weight.to(g.dtype)).addmm_(t, a.to(g.dtype), alpha=ctx.scale).view(x.shape)
        return dx, None, da, db, None
