"""Rotary positions of queries and keys at once, halves layout: a program turns one token's heads by angles it loads once.

    y[c] = x[c] cos - x[c + h] sin      y[c + h] = x[c + h] cos + x[c] sin      c < h = the number of angles

Channels from 2h on stay as they are. The derivative is the transpose, and a rotation's transpose turns back: the sign of the sine
flips, so the backward is this kernel with -sin. Kept for it: cos and sin. Plain twin: `kobza.layers.rotate`, once each.

Shapes as in model.py: q (B, H, T, D), k (B, K, T, D), in any order of axes but the last.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kobza.kernels.triton.launch import launch, wide


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) and k (B, K, T, D) turned by the angles of cos, sin: (T, h) or (B, 1, T, h), h <= D/2."""
    return RopeFunction.apply(q, k, cos, sin)


class RopeFunction(torch.autograd.Function):
    """The autograd node of `rope`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turn(q, k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *turn(dq, dk, *ctx.saved_tensors, -1.0), None, None


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """q and k turned by sign times the angles."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    B, H, T, D = q.shape
    per_row = 0 if cos.ndim == 2 else T  # (T, h): the same angles in each row of the batch
    strides = [stride for x in (q, out_q, k, out_k) for stride in x.stride()[:3]]
    sizes = {"H": H, "K": k.shape[1], "D": D, "HALF": cos.shape[-1], "SIGN": sign, "WIDE": wide(q)}
    blocks = {name: triton.next_power_of_2(size) for name, size in (("BH", H), ("BK", k.shape[1]), ("BD", D))}
    tile = blocks["BH"] * blocks["BD"]
    launch(kernel, (B * T,), q, out_q, k, out_k, cos, sin, T, per_row, *strides, **sizes, **blocks, tile=tile)
    return out_q, out_k


@triton.jit
def kernel(
    q_ptr, out_q_ptr, k_ptr, out_k_ptr, cos_ptr, sin_ptr, T, per_row,
    q_b, q_h, q_t, out_q_b, out_q_h, out_q_t, k_b, k_h, k_t, out_k_b, out_k_h, out_k_t,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
    BH: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token's heads a program."""
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    col = tl.arange(0, BD)
    angle = (b * per_row + t) * HALF + col % HALF
    turned = col < 2 * HALF
    cos = tl.load(cos_ptr + angle, mask=turned, other=1.0).to(WIDE)
    sin = tl.load(sin_ptr + angle, mask=turned, other=0.0).to(WIDE) * SIGN
    sin = tl.where(col < HALF, -sin, sin)
    q_ptr, out_q_ptr = q_ptr + b * q_b + t * q_t, out_q_ptr + b * out_q_b + t * out_q_t
    k_ptr, out_k_ptr = k_ptr + b * k_b + t * k_t, out_k_ptr + b * out_k_b + t * out_k_t
    turn_heads(q_ptr, out_q_ptr, q_h, out_q_h, cos, sin, H, D, HALF, BH, BD)
    turn_heads(k_ptr, out_k_ptr, k_h, out_k_h, cos, sin, K, D, HALF, BK, BD)


@triton.jit
def turn_heads(
    x_ptr, y_ptr, x_h, y_h, cos, sin,
    N: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """N heads of one token: x cos + partner sin, where sin is negative in the first half and 0 in what is not turned."""
    head, col = tl.arange(0, BN)[:, None].to(tl.int64), tl.arange(0, BD)[None, :]
    partner = tl.where(col < HALF, col + HALF, tl.where(col < 2 * HALF, col - HALF, col))
    inside = (head < N) & (col < D)
    x = tl.load(x_ptr + head * x_h + col, mask=inside, other=0.0).to(cos.dtype)
    other = tl.load(x_ptr + head * x_h + partner, mask=inside, other=0.0).to(cos.dtype)  # the same cache lines
    y = x * cos[None, :] + other * sin[None, :]
    tl.store(y_ptr + head * y_h + col, y.to(y_ptr.dtype.element_ty), mask=inside)
