"""The gate of SwiGLU and GEGLU: out = act(g) u, one pass over g and u, nothing kept besides them.

    silu       act = g s                    act' = s (1 + g (1 - s))                  s = 1 / (1 + exp(-g))
    gelu       act = g P(g)                 act' = P + g exp(-g^2 / 2) / sqrt(2 pi)   P = (1 + erf(g / sqrt 2)) / 2
    gelu_tanh  act = g (1 + t) / 2          act' = (1 + t) / 2 + g (1 - t^2) a' / 2   t = tanh(a), a = sqrt(2 / pi) (g + c g^3)

Backward of d = dL/dout: dg = d u act'(g), du = d act(g). The activation is computed again rather than kept, and dg and du are
written over g and u, which came out of a product and which nobody needs any more. Their version is counted up, so that autograd
refuses a second backward, or another operation that kept them. Plain twin: `act(gate) * up` in `kobza.layers.GatedMLP`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from kobza.kernels.triton.launch import launch, tanh, wide

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK = 1024


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up, act one of ACTIVATIONS. (..., F) each -> (..., F)."""
    return GLUFunction.apply(gate, up, act)


class GLUFunction(torch.autograd.Function):
    """The autograd node of `glu`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        assert gate is not up, "each is overwritten by its own gradient"
        gate, up = (ours_to_overwrite(x, any(ctx.needs_input_grad)) for x in (gate, up))
        ctx.act = act
        ctx.save_for_backward(gate, up)
        out, n = torch.empty_like(gate), gate.numel()
        launch(forward_kernel, grid(n), gate, up, out, n, ACT=act, WIDE=wide(gate), BLOCK=BLOCK, tile=BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        n = gate.numel()
        launch(
            backward_kernel, grid(n), gate, up, d.contiguous(), n, ACT=ctx.act, WIDE=wide(gate), BLOCK=BLOCK, tile=BLOCK
        )
        increment_version((gate, up))
        return gate, up, None


def ours_to_overwrite(x: Tensor, differentiated: bool) -> Tensor:
    """x without gaps; a copy where it is no operation's result but someone's weights or data, and a backward may follow."""
    return x.clone(memory_format=torch.contiguous_format) if differentiated and x.grad_fn is None else x.contiguous()


def grid(n: int) -> tuple[int]:
    """A program a block."""
    return (triton.cdiv(n, BLOCK),)


@triton.jit
def activation(g, ACT: tl.constexpr):
    """act(g) and act'(g)."""
    if ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-g))
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu":
        p = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))  # 1 / sqrt 2
        return g * p, p + g * tl.exp(-0.5 * g * g) * 0.3989422804014327  # 1 / sqrt(2 pi)
    else:
        t = tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))  # sqrt(2 / pi); Hendrycks & Gimpel 2016
        slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * g * g)
        return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope


@triton.jit
def forward_kernel(g_ptr, u_ptr, out_ptr, n, ACT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(WIDE)
    u = tl.load(u_ptr + at, mask=at < n, other=0.0).to(WIDE)
    value, slope = activation(g, ACT)
    tl.store(out_ptr + at, (value * u).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def backward_kernel(g_ptr, u_ptr, d_ptr, n, ACT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements a program; dg over g, du over u."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(g_ptr + at, mask=at < n, other=0.0).to(WIDE)
    u = tl.load(u_ptr + at, mask=at < n, other=0.0).to(WIDE)
    d = tl.load(d_ptr + at, mask=at < n, other=0.0).to(WIDE)
    value, slope = activation(g, ACT)
    tl.store(g_ptr + at, (d * u * slope).to(g_ptr.dtype.element_ty), mask=at < n)
    tl.store(u_ptr + at, (d * value).to(u_ptr.dtype.element_ty), mask=at < n)
