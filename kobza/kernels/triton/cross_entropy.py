"""Cross-entropy of logits z (N, V), whatever V: a program takes a row BLOCK columns at a time, with a running logsumexp.

    l = cap tanh(z / cap) or z        loss = logsumexp(l) - l[target]; 0 where the target is IGNORE
    m' = max(m, max(l_block));        s' = s exp(m - m') + sum(exp(l_block - m'));        logsumexp(l) = m + log(s)

Backward of g = dL/dloss:  dz = g (exp(l - logsumexp(l)) - [column = target]) (1 - (l / cap)^2, with a cap); 0 where IGNORE.

No softmax is ever stored: the backward reads z again and writes dz over it, so the largest tensor of training exists once. The
version of z is counted up, so that autograd refuses whoever else kept it. Plain twin: `F.cross_entropy` in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from kobza.kernels.triton.launch import launch, tanh, wide
from kobza.train import IGNORE

BLOCK = 8192  # columns at a time


def cross_entropy(logits: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """Summed over the targets (N,) that are not IGNORE, in nats, 0-d, float32. logits (N, V) before the softcap; the backward
    overwrites them. A target beyond the vocabulary makes the loss nan."""
    return CrossEntropyFunction.apply(logits, targets, softcap)


class CrossEntropyFunction(torch.autograd.Function):
    """The autograd node of `cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        losses, norms = row_losses(logits, targets, softcap)
        ctx.save_for_backward(logits, targets, norms)
        ctx.softcap = softcap
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, norms = ctx.saved_tensors
        to_gradient(logits, targets, norms, g, ctx.softcap)
        increment_version(logits)
        return logits, None, None


def row_losses(logits: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Each row's loss and logsumexp, (N,) each."""
    losses = torch.empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    norms = torch.empty_like(losses)
    settings = constants(logits, softcap)
    launch(losses_kernel, (len(logits),), logits, logits.stride(0), targets, losses, norms, **settings)
    return losses, norms


def to_gradient(logits: Tensor, targets: Tensor, norms: Tensor, g: Tensor, softcap: float) -> None:
    """Overwrite logits (N, V) with g times the gradient of the summed loss; g 0-d."""
    settings = constants(logits, softcap)
    grid = (len(logits), triton.cdiv(logits.shape[1], settings["BLOCK"]))
    launch(gradient_kernel, grid, logits, logits.stride(0), targets, norms, g, **settings)


def constants(logits: Tensor, softcap: float) -> dict[str, Any]:
    """What both kernels are compiled for."""
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    return {"V": logits.shape[1], "CAP": softcap, "SKIP": IGNORE, "WIDE": wide(logits), "BLOCK": block, "tile": block}


@triton.jit
def losses_kernel(
    z_ptr, stride, targets_ptr, losses_ptr, norms_ptr,
    V: tl.constexpr, CAP: tl.constexpr, SKIP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    m = tl.full((), -3e38, dtype=WIDE)  # not -inf: exp(-inf + inf) is nan, and a block may be all -inf
    s = tl.zeros((), dtype=WIDE)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + col, mask=col < V, other=float("-inf")).to(WIDE)
        if CAP > 0:
            z = tl.where(col < V, CAP * tanh(z / CAP), float("-inf"))
        new_m = tl.maximum(m, tl.max(z, axis=0))
        s = s * tl.exp(m - new_m) + tl.sum(tl.exp(z - new_m), axis=0)
        m = new_m
    norm = m + tl.log(s)
    target = tl.load(targets_ptr + row)
    z = tl.load(z_ptr + target, mask=(target >= 0) & (target < V), other=float("nan")).to(WIDE)
    if CAP > 0:
        z = CAP * tanh(z / CAP)
    tl.store(losses_ptr + row, tl.where(target == SKIP, 0.0, norm - z))
    tl.store(norms_ptr + row, norm)


@triton.jit
def gradient_kernel(
    z_ptr, stride, targets_ptr, norms_ptr, g_ptr,
    V: tl.constexpr, CAP: tl.constexpr, SKIP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row a program."""
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z_ptr += row * stride
    target = tl.load(targets_ptr + row)
    g = tl.where(target == SKIP, 0.0, tl.load(g_ptr).to(WIDE))
    z = tl.load(z_ptr + col, mask=col < V, other=0.0).to(WIDE)
    slope = 1.0
    if CAP > 0:
        t = tanh(z / CAP)
        z, slope = CAP * t, 1.0 - t * t
    dz = g * (tl.exp(z - tl.load(norms_ptr + row)) - tl.where(col == target, 1.0, 0.0)) * slope
    tl.store(z_ptr + col, dz.to(z_ptr.dtype.element_ty), mask=col < V)
