"""Weights in 8 bits: 127 steps to either side of zero, as long as a row's largest weight asks for.

    W[i, j] = scale[i] * codes[i, j]      scale[i] = max_j |W[i, j]| / 127, rounded up to a bf16 number

That the scales are bf16 numbers costs 0.4% of a step on average, and no product in bf16 has to round them. A product of few rows
in bf16 reads the codes as they lie (torch's own kernel): a new token of a 135M model takes 9.1 ms of products in place of 17.8
in float32 and 10.8 in packed bf16. Any other turns a stretch of codes into numbers, small enough to stay near the core, and
multiplies with those. A table takes the same form, so that a head which shares it goes on doing so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import require
from kobza.layers import Embedding

STEPS = 127
CHUNK = 1 << 18  # weights turned into numbers at a time; 1 MB in float32
FEW_ROWS = 8  # up to here the kernel on codes, which does the rows one by one, is faster than making numbers of them
KERNEL_STEP = 32  # columns: at widths that are no multiple the kernel reads past the end and crashes (torch 2.13)


class Rows8(NamedTuple):
    """A matrix in 8 bits."""

    codes: Tensor
    """(out, in) int8, -127 .. 127"""
    scale: Tensor
    """(out,) bf16"""


@torch.no_grad()
def quantize_int8(weight: Tensor) -> Rows8:
    """A float matrix (out, in) in 8 bits, each number the nearest that its row has."""
    largest = torch.stack((weight.amax(1).float(), -weight.amin(1).float())).amax(0) / STEPS
    require(bool(largest.isfinite().all()), "int8: the weights hold inf or nan; take another checkpoint")
    scale = ((largest.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)  # up to the next bf16 number
    steps = scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    n = rows_at_once(weight)
    parts = zip(weight.split(n), steps.split(n), strict=True)
    return Rows8(torch.cat([(w.float() / s).round_().to(torch.int8) for w, s in parts]), scale.bfloat16())


@torch.no_grad()
def dequantize_int8(packed: Rows8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that `quantize_int8` packed; computed in float32, so bf16 is the float32 one rounded."""
    out = torch.empty(packed.codes.shape, dtype=dtype, device=packed.codes.device)
    n = rows_at_once(out)
    for made, codes, scale in zip(out.split(n), packed.codes.split(n), packed.scale.split(n), strict=True):
        made.copy_(codes * scale.float()[:, None])
    return out


def rows_at_once(matrix: Tensor) -> int:
    """Rows of a matrix that make a stretch of CHUNK."""
    return max(1, CHUNK // max(1, matrix.shape[1]))


class Weight8bit(nn.Module):
    """What a layer and a table have in common: a matrix in 8 bits, which moves with the model but is never cast."""

    def __init__(self, packed: Rows8):
        super().__init__()
        for name, part in zip(Rows8._fields, packed, strict=True):
            self.register_buffer(name, part, persistent=False)

    @property
    def packed(self) -> Rows8:
        """The matrix as it lies in memory."""
        return Rows8(self.codes, self.scale)

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, made anew at each look."""
        return dequantize_int8(self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weight8bit:
        """Go with the model to its device, the scales as they are: in float16 small ones would be lost."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.codes.device)
        return self


class Linear8bit(Weight8bit):
    """A Linear whose weight is in 8 bits and stays. (..., in) -> (..., out), in the dtype of its input."""

    def __init__(self, packed: Rows8, bias: nn.Parameter | None = None):
        super().__init__(packed)
        self.out_features, self.in_features = packed.codes.shape
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> Linear8bit:
        """A Linear, packed."""
        return cls(quantize_int8(linear.weight.detach()), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = Product8bit.apply(x, self.packed)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, int8"


class Product8bit(torch.autograd.Function):
    """x W^T, W in 8 bits; the backward reads the codes again and nothing of W's size is kept. dx = (g scale) codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Rows8) -> Tensor:
        ctx.packed = packed
        rows, scale = x.reshape(-1, x.shape[-1]), packed.scale.to(x.dtype)
        fits = packed.codes.shape[1] % KERNEL_STEP == 0
        if x.dtype == torch.bfloat16 and x.is_cpu and len(rows) <= FEW_ROWS and fits:
            y = torch._weight_int8pack_mm(rows.contiguous(), packed.codes, scale)
        else:
            codes = packed.codes.split(rows_at_once(packed.codes))
            y = torch.cat([F.linear(rows, part.to(x.dtype)) for part in codes], dim=-1).mul_(scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        n = rows_at_once(ctx.packed.codes)
        pieces = zip((g * ctx.packed.scale.to(g.dtype)).split(n, dim=-1), ctx.packed.codes.split(n), strict=True)
        return sum(part @ codes.to(g.dtype) for part, codes in pieces), None


class Embedding8bit(Weight8bit):
    """Rows of a table in 8 bits, in `dtype` (None: the model's own), times the table's factor. ids (...) -> (..., C)."""

    def __init__(self, packed: Rows8, factor: float = 1.0):
        super().__init__(packed)
        self.factor = factor
        self.like = nn.Parameter(torch.empty(0))  # goes with the model, and so knows its dtype and device

    @classmethod
    def of(cls, table: Embedding) -> Embedding8bit:
        """A table, packed."""
        return cls(quantize_int8(table.weight.detach()), table.scale)

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        x = F.embedding(ids, self.codes).float() * F.embedding(ids, self.scale.float()[:, None])
        x = x.to(dtype or self.like.dtype)
        return x if self.factor == 1 else x * x.new_full((), self.factor)  # rounded as in layers.Embedding

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{', '.join(map(str, self.codes.shape))}, int8"
