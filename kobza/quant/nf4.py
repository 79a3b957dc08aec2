"""NF4: weights in 4.127 bits each, for a base that LoRA leaves as it is (QLoRA, Dettmers et al. 2023).

The 16 values are quantiles of a normal distribution, as weights roughly are, so that each is used equally often. A weight is the
nearest of them times the largest of its 64 neighbours; those scales, less their mean, are again 8-bit codes in blocks of 256:

    4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits

Plain torch on every device, each bit as bitsandbytes' torch kernels have it. Dequantising is one look-up a byte, in a table of
all 256 pairs of values. Nothing of it is saved: the same weights give the same bits. (Of a matrix of tens of millions the mean of
the scales may move by its last bit with the number of threads, as torch's sums do.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kobza.config import require
from kobza.quant.blocks import Codebook, dequantize_blocks, dynamic, quantize_blocks, scale_blocks_
from kobza.surgery import Match, replace_modules

# Quantiles of N(0, 1), asymmetric so that 0 is exact; Dettmers et al. 2023, appendix E
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
ZERO = NF4.index(0.0)
BLOCK, SCALE_BLOCK = 64, 256
CHUNK = 1 << 19  # weights at a time: what is needed besides stays small, and near the core


class Quantized(NamedTuple):
    """A weight in 4 bits: n weights, s = ceil(n / 64) scales."""

    codes: Tensor
    """(ceil(n / 2),) uint8, two weights a byte, the first in the upper half"""
    scale_codes: Tensor
    """(s,) uint8: each block's scale less `offset`"""
    scale_scales: Tensor
    """(ceil(s / 256),) float32"""
    offset: Tensor
    """0-d float32: mean of the scales"""


@functools.cache
def book(device: torch.device) -> Codebook:
    """The 16 values."""
    return Codebook(torch.tensor(NF4, device=device))


@functools.cache
def pairs(device: torch.device) -> Tensor:
    """The two values of each byte, (256,): two float32 in the bits of an int64, so that one look-up fetches both."""
    values = torch.tensor(NF4, device=device)
    return torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1).view(torch.int64).squeeze(1)


@torch.no_grad()
def quantize_nf4(weight: Tensor) -> Quantized:
    """A float weight of any shape in 4 bits; its blocks run on over the ends of rows."""
    flat, device = weight.reshape(-1), weight.device
    parts = [quantize_blocks(flat[i : i + CHUNK].float(), BLOCK, book(device)) for i in range(0, len(flat), CHUNK)]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    offset = scales.mean()
    require(
        bool(offset.isfinite()),
        "--quantize nf4: the weights hold inf, nan or numbers near them; take another checkpoint",
    )
    codes = F.pad(codes, (0, len(codes) % 2), value=ZERO)
    scale_codes, scale_scales = quantize_blocks(scales - offset, SCALE_BLOCK, dynamic(True, device))
    return Quantized((codes[::2] << 4) | codes[1::2], scale_codes, scale_scales, offset)


@torch.no_grad()
def dequantize_nf4(packed: Quantized, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight that `quantize_nf4` packed, in `dtype`; computed in float32, so bf16 is the float32 one rounded."""
    scales = dequantize_blocks(packed.scale_codes, packed.scale_scales, SCALE_BLOCK, dynamic(True, packed.codes.device))
    scales.add_(packed.offset)
    table, n = pairs(packed.codes.device), torch.Size(shape).numel()
    out = torch.empty(n, dtype=dtype, device=scales.device)
    for start in range(0, n, CHUNK):
        values = table.index_select(0, packed.codes[start // 2 : (start + CHUNK) // 2].int()).view(torch.float32)
        scale_blocks_(values, scales[start // BLOCK : (start + CHUNK) // BLOCK], BLOCK)
        out[start : start + CHUNK] = values[: n - start]
    return out.view(shape)


class Linear4bit(nn.Module):
    """A Linear whose weight is in 4 bits and stays. (..., in) -> (..., out), in the dtype of its input."""

    def __init__(self, packed: Quantized, shape: tuple[int, ...], bias: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = shape
        for name, part in zip(Quantized._fields, packed, strict=True):
            self.register_buffer(name, part, persistent=False)
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Linear) -> Linear4bit:
        """A Linear, packed."""
        return cls(quantize_nf4(linear.weight.detach()), tuple(linear.weight.shape), linear.bias)

    @property
    def packed(self) -> Quantized:
        """The weight as it lies in memory."""
        return Quantized(self.codes, self.scale_codes, self.scale_scales, self.offset)

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, made anew at each look."""
        return self.dequantize(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`."""
        return dequantize_nf4(self.packed, (self.out_features, self.in_features), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        """Go with the model to its device, but keep the scales in float32: model.to(bf16) would move every weight."""
        scales, offset = self.scale_scales, self.offset
        super()._apply(fn, recurse)
        self.scale_scales, self.offset = scales.to(self.codes.device), offset.to(self.codes.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return Linear4bitFunction.apply(x, self, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"


class Linear4bitFunction(torch.autograd.Function):
    """x W^T + b, where the backward dequantises W again: nothing of its size is kept. dx = g W, db = sum of g over the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = g @ ctx.layer.dequantize(g.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


def in_blocks(name: str, module: nn.Module) -> bool:
    """Whether a module is a Linear of the trunk; the head and the tables stay as they are."""
    return name.startswith("blocks.") and isinstance(module, nn.Linear)


def use(model: nn.Module, match: Match = in_blocks) -> list[str]:
    """Put a Linear4bit in place of each Linear that matches -> their names. A weight that a table shares is left."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def is_free(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and id(module.weight) not in tables and match(name, module)

    def pack(linear: nn.Linear) -> Linear4bit:
        layer = Linear4bit.of(linear)
        linear.weight = None  # now, and not when the last layer is done: never two models in memory
        return layer

    return replace_modules(model, is_free, pack)
