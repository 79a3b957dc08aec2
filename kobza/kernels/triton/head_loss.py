"""The head and the cross-entropy in one node that holds the logits of a few rows only, and those once.

    z = x W^T      loss = cross_entropy(z)      dx = dz W      dW = dz^T x

As `kobza.kernels.head_loss`, its plain twin, this takes the gradients while the rows' logits are there, since the loss is one
number and what comes from above it only a factor. The products are the GPU maker's; between them Triton's kernels of
cross_entropy.py read the logits in the compute dtype and turn them into dz in place, where torch makes three float32 copies.
In float16 dz is kept SCALE times as large: a probability of 1 / V is below its normal numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kobza.kernels.triton.cross_entropy import row_losses, to_gradient

CHUNK_LOGITS = 1 << 26  # 128 MB in bf16: 512 rows of 128k tokens, enough work for a product
SCALE = 1024.0


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0, chunk: int | None = None) -> Tensor:
    """Cross-entropy in nats, summed over the targets that are not IGNORE; 0-d, float32. x (N, C), weight (V, C), targets (N,).

    chunk: rows at a time."""
    return HeadLossFunction.apply(x, weight, targets, softcap, chunk or max(1, CHUNK_LOGITS // len(weight)))


class HeadLossFunction(torch.autograd.Function):
    """The autograd node of `head_loss`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float, chunk: int) -> Tensor:
        wants_dx, wants_dw = ctx.needs_input_grad[:2]
        w, wide = weight.to(x.dtype), torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        half = x.dtype == torch.float16
        scale = torch.full_like(total, SCALE if half else 1.0)
        product = wide if half else x.dtype  # of dW, which sums past float16's 65,504
        dx = torch.empty_like(x) if wants_dx else None
        dw = torch.zeros(w.shape, dtype=wide, device=x.device) if wants_dw else None
        logits = x.new_empty(min(chunk, len(x)), len(w))
        for start in range(0, len(x), chunk):
            rows = slice(start, min(start + chunk, len(x)))
            z = torch.mm(x[rows], w.t(), out=logits[: rows.stop - start])
            losses, norms = row_losses(z, targets[rows], softcap)
            total += losses.sum()
            if wants_dx or wants_dw:
                to_gradient(z, targets[rows], norms, scale, softcap)
            if wants_dx:
                torch.mm(z, w, out=dx[rows])
            if wants_dw:
                dw += z.t().to(product) @ x[rows].to(product)
        ctx.save_for_backward(dx, dw, scale)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, scale = ctx.saved_tensors
        g = (g / scale)[None]  # an axis more: torch would round a 0-d g to the format of dx first
        dx = None if dx is None else torch.mul(dx, g, out=torch.empty_like(dx))
        dw = None if dw is None else dw.mul_(g).to(ctx.dtype)  # in place: it is as large as W
        return dx, dw, None, None, None
