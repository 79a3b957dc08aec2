"""RMSNorm of rows x (N, C), forward and backward in one pass each over the activations.

    r = 1 / sqrt(mean(x^2) + eps)      n = x r      w' = w + offset
    y = round(n) round(w')  as Llama;     y = n w', rounded once, as Gemma (cast_late)

Backward of g = dL/dy, with h = g w'. From dr/dx = -r^3 x / C:

    dx = r h - r^3 x mean(h x) = r (h - n mean(h n))      dw = sum over rows of g n      (Llama's n is the rounded one)

dw is summed in two stages, by each program over its rows and then over the programs, so that its bits do not depend on which
program ends first. Kept for the backward: x, w and r (one number a row). Plain twin: `kobza.layers.RMSNorm`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kobza.kernels.triton.launch import laid_as, launch, n_programs, side_by_side, wide


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast_late: bool = False) -> Tensor:
    """x / rms(x) * (weight + offset) over the last axis. (..., C) -> (..., C), in x's dtype."""
    return RMSNormFunction.apply(x, weight, eps, offset, cast_late)


class RMSNormFunction(torch.autograd.Function):
    """The autograd node of `rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_late: bool) -> Tensor:
        x = side_by_side(x)
        y = torch.empty_like(x)
        n_rows, rows = x.numel() // x.shape[-1], tile_rows(x.shape[-1])
        rstd = torch.empty(n_rows, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        ctx.constants = constants(x, weight, eps, offset, cast_late)
        grid = (triton.cdiv(n_rows, rows),)
        launch(forward_kernel, grid, x, weight, y, rstd, n_rows, tile=rows * ctx.constants["BLOCK"], **ctx.constants)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        n_rows, rows, learns = len(rstd), ctx.constants["ROWS"], ctx.needs_input_grad[1]
        dx, g = torch.empty_like(x), laid_as(g, x)
        n_tiles = triton.cdiv(n_rows, rows)
        n = min(n_tiles, n_programs(x))
        each = triton.cdiv(n_tiles, max(n, 1)) * rows
        dw = torch.empty((n if learns else 0, x.shape[-1]), dtype=rstd.dtype, device=x.device)
        tile = rows * ctx.constants["BLOCK"]
        launch(
            backward_kernel, (n,), x, weight, rstd, g, dx, dw, n_rows, each, LEARNS=learns, tile=tile, **ctx.constants
        )
        return dx, dw.sum(0).to(weight.dtype) if learns else None, None, None, None


def tile_rows(width: int) -> int:
    """Rows of a tile: many where a row is a head, one where it is a wide model's."""
    return max(1, 2048 // triton.next_power_of_2(width))


def constants(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_late: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    width = x.shape[-1]
    numbers = {"C": width, "EPS": eps, "OFFSET": offset, "ROWS": tile_rows(width), "WIDE": wide(x)}
    return numbers | {"WEIGHT": weight is not None, "LATE": cast_late, "BLOCK": triton.next_power_of_2(width)}


@triton.jit
def gain(w_ptr, col, dtype, C, OFFSET, LATE: tl.constexpr, WIDE: tl.constexpr):
    """w + offset, rounded to the activations' dtype where the product is in it."""
    w = tl.load(w_ptr + col, mask=col < C, other=0.0).to(WIDE) + OFFSET
    return w if LATE else w.to(dtype).to(WIDE)


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, n_rows,
    C: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    WEIGHT: tl.constexpr, LATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program."""
    dtype = y_ptr.dtype.element_ty
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * C + col[None, :]
    inside = (row < n_rows)[:, None] & (col < C)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / C + EPS)
    y = x * rstd[:, None]
    if WEIGHT:
        n = y if LATE else y.to(dtype).to(WIDE)
        y = n * gain(w_ptr, col, dtype, C, OFFSET, LATE, WIDE)[None, :]
    tl.store(y_ptr + at, y.to(dtype), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)


@triton.jit
def backward_kernel(
    x_ptr, w_ptr, rstd_ptr, g_ptr, dx_ptr, dw_ptr, n_rows, rows_each,
    C: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    WEIGHT: tl.constexpr, LATE: tl.constexpr, BLOCK: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    """rows_each rows a program, ROWS at a time; its part of dw in registers until the end."""
    dtype = x_ptr.dtype.element_ty
    col, first = tl.arange(0, BLOCK), tl.program_id(0) * rows_each
    dw = tl.zeros((BLOCK,), dtype=WIDE)
    for start in range(0, rows_each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * C + col[None, :]
        inside = (row < n_rows)[:, None] & (col < C)[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)[:, None]
        n = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE) * rstd
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(WIDE)
        h = g
        if WEIGHT:
            h = g * gain(w_ptr, col, dtype, C, OFFSET, LATE, WIDE)[None, :]
        if LEARNS:
            dw += tl.sum(g * (n if LATE else n.to(dtype).to(WIDE)), axis=0)
        dx = rstd * (h - n * (tl.sum(h * n, axis=1) / C)[:, None])
        tl.store(dx_ptr + at, dx.to(dtype), mask=inside)
    if LEARNS:
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * C + col, dw, mask=col < C)
