"""Numbers in blocks, each the nearest of a few values times the largest of its block. What nf4.py and adam8.py stand on.

A block's scale is the largest magnitude in it, so an outlier spoils its block and no other (Dettmers et al. 2022). Rounding is
that of bitsandbytes' torch kernels, to the bit: a number half-way between two values takes the lower one, full blocks are
multiplied by 1 / scale, one cut short at the end is divided by it. (Its compiled 8-bit kernel for CPUs rounds to a grid of 65,536
first, which changes two codes in a thousand and loses what is below 1e-5 of a block's largest.)
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

TINY = 1e-38  # bitsandbytes' smallest scale to divide by


class Codebook:
    """At most 256 ascending values, and which of them is nearest to a number.

    `nearest` looks up the upper 16 bits of a float32: all numbers that share them lie between the same two bounds, but for one
    bound at most, which is compared with. Ten times faster than a binary search, and the same result.
    """

    def __init__(self, values: Tensor, bounds: Tensor | None = None):
        """`bounds` (len - 1,): where each value gives way to the next; default half-way."""
        halves = (values[:-1] + values[1:]) / 2 if bounds is None else bounds
        self.values = values
        self.bounds = torch.cat((halves, halves.new_full((1,), float("inf"))))
        upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=values.device) << 16
        lowest = torch.where(upper < 0, upper | 0xFFFF, upper).view(
            torch.float32
        )  # of the numbers that share these bits
        self.n_below = torch.bucketize(lowest, halves).int()

    def nearest(self, x: Tensor) -> Tensor:
        """x (n,) float32, finite -> codes (n,) uint8."""
        code = self.n_below.index_select(0, (x.view(torch.int32) >> 16) + (1 << 15))
        return code.add_(x > self.bounds.index_select(0, code)).to(torch.uint8)


@functools.cache
def dynamic(signed: bool, device: torch.device) -> Codebook:
    """The dynamic 8-bit values of Dettmers 2016: 7 decades up to 1, in each the midpoints of equal steps from a tenth to the
    whole, twice as many in a decade as in the one below; further 0 and 1.

    The unsigned ones are for a mean of squares, which an update is divided by: no positive number becomes 0 in it, for a small
    momentum over a lost square would be a leap (Li et al. 2023). bitsandbytes rounds those to 0.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        steps = torch.linspace(0.1, 1, 2 ** (decade + 1 - signed) + 1)
        middles = 10.0 ** (decade - 6) * ((steps[:-1] + steps[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    book = torch.cat(values).sort().values.to(device)
    if signed:
        return Codebook(book)
    bounds = (book[:-1] + book[1:]) / 2
    bounds[0] = 0
    return Codebook(book, bounds)


def quantize_blocks(x: Tensor, size: int, book: Codebook) -> tuple[Tensor, Tensor]:
    """x (n,) float32 -> codes (n,) uint8 and the scale of each block (ceil(n / size),) float32."""
    full = len(x) // size * size
    blocks, rest = x[:full].view(-1, size), x[full:]
    scales = blocks.abs().amax(1)  # fifteen times as fast as the norm that is this
    scaled = (blocks * (1 / scales.clamp(min=TINY))[:, None]).view(-1)
    if len(rest):
        scale = rest.abs().max().clamp(min=TINY)
        scales, scaled = torch.cat((scales, scale[None])), torch.cat((scaled, rest / scale))
    return book.nearest(scaled.clamp_(-1, 1)), scales


def dequantize_blocks(codes: Tensor, scales: Tensor, size: int, book: Codebook) -> Tensor:
    """What `quantize_blocks` made, back as float32 (n,)."""
    return scale_blocks_(book.values.index_select(0, codes.int()), scales, size)


def scale_blocks_(x: Tensor, scales: Tensor, size: int) -> Tensor:
    """x (n,), each block of it times its scale, in place."""
    full = len(x) // size
    x[: full * size].view(-1, size).mul_(scales[:full, None])
    x[full * size :].mul_(scales[full:])  # a block cut short, or nothing times nothing
    return x
